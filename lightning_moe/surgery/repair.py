"""Least-squares repair: refit each expert's W_down so that the kept channels give its old output (method, section 5).

E experts, C channels of a layer, n channels of one expert (k kept, d dropped), H hidden, L ridges.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.calibration.collector import Batch
from lightning_moe.calibration.gram import LayerGram, iterate_grams
from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.calibration.routed import down_rows
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import MoeLayer, expert_widths, model_shape, moe_layers
from lightning_moe.records import PrunePlan

log = logging.getLogger(__name__)

# Relative to the mean diagonal of the kept channels' Gram.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# The least ridge for an expert that saw fewer tokens than it has channels: its Gram is singular.
SCARCE_RIDGE = 1e-1


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertRepair:
    """New down rows of one expert.

    Args:
        down_rows: `[k, H]`, in the order of the kept channels.
        ridge: the ridge that was chosen; None when the rows stay as they were.
        error_before: `sum g^2 q ||z' - z||^2` of the cut expert over all tokens, rows as they were.
        error_after: the same with new rows, each half of the tokens predicted from the other half.
    """

    down_rows: Tensor
    ridge: float | None
    error_before: float
    error_after: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Repair:
    """New down rows of a whole model, for the cut of one plan.

    Args:
        plan_digest: digest of that plan.
        down_rows: per layer `[kept channels, H]` on the CPU, channels expert by expert in the router's order.
        error_before: per layer, relative squared error of the layer's output per token that the cut alone causes
            (gates held, cross terms between experts left out).
        error_after: the same after the repair, cross-validated.
        num_repaired: per layer, experts that got new rows.
    """

    plan_digest: str
    down_rows: tuple[Tensor, ...]
    error_before: tuple[float, ...]
    error_after: tuple[float, ...]
    num_repaired: tuple[int, ...]

    def check_fits(self, plan: PrunePlan) -> None:
        """Refuses another plan.

        Raises:
            ValueError: the repair was made for another plan.
        """
        if plan.digest != self.plan_digest:
            raise ValueError(
                f"The repair was made for plan {self.plan_digest[:12]}, got plan {plan.digest[:12]}. "
                "Run `plan_repair` with the plan that is applied."
            )

    def summary(self) -> str:
        """A table for people: one line per layer."""
        lines = [f"{'layer':>5} {'experts repaired':>17} {'error before':>13} {'after':>10} {'left':>7}"]
        layers = zip(self.num_repaired, self.error_before, self.error_after, strict=True)
        for index, (count, before, after) in enumerate(layers):
            left = after / before if before else 1.0
            lines.append(f"{index:>5} {count:>17} {before:>13.3e} {after:>10.3e} {left:>7.1%}")
        return "\n".join(lines)


def plan_repair(
    model: PreTrainedModel,
    *,
    plan: PrunePlan,
    loaders: Mapping[str, Iterable[Batch]],
    memory_gb: float = 4.0,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Repair:
    """New down rows for the cut of `plan`; the model itself is not changed (`apply_plan(..., repair=...)` does that).

    Several processes share the batches, and then the experts: each solves for its own, and all get the same rows.

    Args:
        model: the model the plan was made for, uncut.
        plan: which channels stay.
        loaders: corpus name -> batches, as for `collect_statistics`.
        memory_gb: GiB for the Gram matrices of one pass (`iterate_grams`).
        progress: show a progress bar.
        processes: those that share the work; each has the whole model, the same plan and the same loaders.

    Raises:
        ValueError: the plan was made for another model, or one layer needs more than `memory_gb`.
    """
    plan.check_fits(model_shape(model))
    layers = moe_layers(model)
    rows, numbers = [], []
    experts = [_cut_experts(plan, layer_index=layer.index) for layer in layers]
    grams = iterate_grams(
        model, loaders=loaders, memory_gb=memory_gb, experts=experts, progress=progress, processes=processes
    )
    for layer, gram in zip(layers, grams, strict=True):
        repairs = repair_layer(layer, gram=gram, keep_C=plan.keep[layer.index], processes=processes)
        rows.append(torch.cat([one.down_rows for one in repairs]))
        before, after = sum(one.error_before for one in repairs), sum(one.error_after for one in repairs)
        repaired = sum(one.ridge is not None for one in repairs)
        numbers.append((before / gram.num_tokens, after / gram.num_tokens, repaired))
    errors_before, errors_after, num_repaired = zip(*_summed(rows, numbers, processes), strict=True)
    repair = Repair(
        plan_digest=plan.digest,
        down_rows=tuple(rows),
        error_before=errors_before,
        error_after=errors_after,
        num_repaired=num_repaired,
    )
    log.info("Repair of W_down, predicted error per token:\n%s", repair.summary())
    return repair


def _summed(
    rows: list[Tensor], numbers: list[tuple[float, float, int]], processes: Processes
) -> list[tuple[float, float, int]]:
    """Puts together what each process made of its experts; everything else is 0 there, so sums are exact."""
    if processes.size == 1:
        return numbers
    for index, rows_kH in enumerate(rows):
        wide_kH = rows_kH.to(torch.promote_types(rows_kH.dtype, torch.float32))
        processes.sum_(wide_kH)
        rows[index] = wide_kH.to(rows_kH.dtype)
    total_L3 = torch.tensor(numbers, dtype=torch.float64)
    processes.sum_(total_L3)
    return [(before, after, int(repaired)) for before, after, repaired in total_L3.tolist()]


def repair_layer(
    layer: MoeLayer, *, gram: LayerGram, keep_C: Tensor, processes: Processes = ALONE
) -> list[ExpertRepair]:
    """Repairs of all experts of one layer, in the router's order; an evicted expert has no rows.

    Rows are on the CPU, in the weights' type (fp32 for packed experts). Of several processes each solves for every
    `size`-th expert; rows and errors of the others are 0 here.
    """
    experts = layer.experts
    packed = isinstance(experts, ChannelExperts) and experts.packed
    dtype = torch.float32 if packed else next(experts.parameters()).dtype
    repairs = []
    for expert, keep_n in enumerate(keep_C.split(expert_widths(experts))):
        down_nH = down_rows(experts, expert, dtype=dtype).detach()
        if expert % processes.size == processes.rank:
            one = repaired_down_rows(
                down_nH=down_nH,
                keep_n=keep_n,
                half_a=gram.half_a[expert],
                half_b=gram.half_b[expert],
                num_tokens=gram.counts[expert],
            )
        else:
            rows_kH = torch.zeros_like(down_nH[keep_n], device="cpu")
            one = ExpertRepair(down_rows=rows_kH, ridge=None, error_before=0.0, error_after=0.0)
        repairs.append(one)
    return repairs


def repaired_down_rows(
    *,
    down_nH: Tensor,
    keep_n: Tensor,
    half_a: Tensor,
    half_b: Tensor,
    num_tokens: int,
    ridges: Sequence[float] = RIDGES,
) -> ExpertRepair:
    """`W' = W_k + (G_kk + lambda m I)^-1 G_kd W_d` with `m` the mean diagonal of G_kk (method, section 5).

    The ridge pulls towards the rows as they were, so few tokens mean little change. It is chosen per expert by
    cross-validation between the two halves of the tokens: only a ridge that, fitted on one half, lowers the error of
    the other by more than a share of `1 / sqrt(num_tokens / 2)`, both ways round, may be used, else the rows stay.
    That is the noise of a mean over so few tokens: an expert that saw 8 must gain half, one that saw 8000 1.6 %. One
    that saw fewer tokens than it has channels gets no ridge below `SCARCE_RIDGE`. The rows are then fitted on all
    tokens.

    Args:
        down_nH: transposed down projection `[n, H]`.
        keep_n: true for a channel that stays.
        half_a: Gram `[n, n]` of one half of the tokens (`LayerGram`).
        half_b: the other half's.
        num_tokens: tokens routed to the expert, both halves together.
        ridges: candidates, relative to the mean diagonal.
    """
    if bool(keep_n.all()) or not bool(keep_n.any()):
        return ExpertRepair(down_rows=down_nH[keep_n].cpu(), ridge=None, error_before=0.0, error_after=0.0)
    order_n = torch.cat([keep_n.nonzero(), (~keep_n).nonzero()]).flatten().to(half_a.device)
    kept_kH, dropped_dH = down_nH.index_select(0, order_n).to(half_a.dtype).tensor_split([int(keep_n.sum())])
    weight_dd = dropped_dH @ dropped_dH.T
    a, b = (_SplitGram.of(half, order_n=order_n, num_kept=len(kept_kH)) for half in (half_a, half_b))
    fit_a, fit_b = (_RidgeFit(half, weight_dd=weight_dd, ridges=ridges) for half in (a, b))
    before_2 = torch.stack([half.unrepaired_error(weight_dd) for half in (a, b)])
    after_L2 = torch.stack([fit_b.errors_on(a), fit_a.errors_on(b)], dim=1)
    scarce = num_tokens < len(keep_n)
    allowed_L = torch.tensor([not scarce or ridge >= SCARCE_RIDGE for ridge in ridges], device=after_L2.device)
    best = _best_ridge(before_2, after_L2, allowed_L=allowed_L, num_tokens=num_tokens)
    if best is None:
        total = float(before_2.sum())
        return ExpertRepair(down_rows=down_nH[keep_n].cpu(), ridge=None, error_before=total, error_after=total)
    rows_kH = kept_kH + (a + b).ridge_solution(ridges[best]) @ dropped_dH
    return ExpertRepair(
        down_rows=rows_kH.to(down_nH.dtype).cpu(),
        ridge=ridges[best],
        error_before=float(before_2.sum()),
        error_after=float(after_L2[best].sum()),
    )


def _cut_experts(plan: PrunePlan, *, layer_index: int) -> tuple[int, ...]:
    """Experts that lose some of their channels, but not all."""
    widths = zip(plan.widths(layer_index), plan.shape.layers[layer_index].widths, strict=True)
    return tuple(expert for expert, (kept, width) in enumerate(widths) if 0 < kept < width)


def _best_ridge(before_2: Tensor, after_L2: Tensor, *, allowed_L: Tensor, num_tokens: int) -> int | None:
    noise = min(1.0, (2 / max(1, num_tokens)) ** 0.5)
    allowed_L = allowed_L & (after_L2 < before_2 * (1 - noise)).all(1)
    total_L = after_L2.sum(1).masked_fill(~allowed_L, torch.inf)
    return int(total_L.argmin()) if bool(allowed_L.any()) else None


@dataclass(frozen=True, kw_only=True, eq=False)
class _SplitGram:
    """A Gram, split into kept and dropped channels."""

    kk: Tensor
    kd: Tensor
    dd: Tensor

    @classmethod
    def of(cls, gram_nn: Tensor, *, order_n: Tensor, num_kept: int) -> "_SplitGram":
        """`order_n` lists the kept channels, then the dropped ones."""
        kept_kn, dropped_dn = gram_nn.index_select(0, order_n).index_select(1, order_n).tensor_split([num_kept])
        return cls(kk=kept_kn[:, :num_kept], kd=kept_kn[:, num_kept:], dd=dropped_dn[:, num_kept:])

    def __add__(self, other: "_SplitGram") -> "_SplitGram":
        return _SplitGram(kk=self.kk + other.kk, kd=self.kd + other.kd, dd=self.dd + other.dd)

    def unrepaired_error(self, weight_dd: Tensor) -> Tensor:
        """`tr(W_d^T G_dd W_d)`, summed in float64."""
        return (self.dd * weight_dd).sum(dtype=torch.float64)

    def ridge_strength(self, ridge: float) -> Tensor:
        """`lambda m`."""
        return ridge * self.kk.diagonal().mean().clamp_min(torch.finfo(self.kk.dtype).tiny)

    def ridge_solution(self, ridge: float) -> Tensor:
        """`S = (G_kk + lambda m I)^-1 G_kd` `[k, d]`, solved in float64."""
        ridged_kk = self.kk.to(torch.float64, copy=True)
        ridged_kk.diagonal().add_(self.ridge_strength(ridge))
        return torch.cholesky_solve(self.kd.double(), torch.linalg.cholesky(ridged_kk)).to(self.kd.dtype)


class _RidgeFit:
    """`S = (G_kk + lambda m I)^-1 G_kd` for all ridges from one eigendecomposition `G_kk = U diag(v) U^T`.

    With `P = U^T G_kd` and `s = 1 / (v + lambda m)` it is `S = U diag(s) P`, so the error `tr(D^T B D)` of the new rows
    on any Gram B, `D = [S W_d; -W_d]`, is a quadratic in s: `s^T Q s - 2 r^T s + const`. The terms may be 10^8 times
    their sum, so they are added in float64; products and eigenvectors have the Gram's own type. With a float32 Gram,
    errors below some 10^-7 of the one without repair are therefore noise. Where a few tokens are a thousand times as
    large as the others, even larger ones may be several per cent off: the others are the Gram's last digits.
    """

    def __init__(self, gram: _SplitGram, *, weight_dd: Tensor, ridges: Sequence[float]) -> None:
        value_k, self.basis_kk = torch.linalg.eigh(gram.kk)
        self.projected_kd = self.basis_kk.T @ gram.kd
        self.weight_dd = weight_dd
        strength_L = torch.stack([gram.ridge_strength(ridge) for ridge in ridges])
        self.inverse_Lk = 1 / (value_k.clamp_min(0) + strength_L.unsqueeze(1))

    def errors_on(self, gram: _SplitGram) -> Tensor:
        """Error of each ridge's rows on another Gram, float64 `[L]`, at least 0."""
        basis_kk, weighted_kd = self.basis_kk, self.projected_kd @ self.weight_dd
        turned_kk = basis_kk.T @ gram.kk @ basis_kk
        quadratic_kk = (turned_kk * (weighted_kd @ self.projected_kd.T)).double()
        linear_k = ((basis_kk.T @ gram.kd) * weighted_kd).sum(1, dtype=torch.float64)
        inverse_Lk = self.inverse_Lk.double()
        quadratic_L = ((inverse_Lk @ quadratic_kk) * inverse_Lk).sum(1)
        return (quadratic_L - 2 * inverse_Lk @ linear_k + gram.unrepaired_error(self.weight_dd)).clamp_min(0)
