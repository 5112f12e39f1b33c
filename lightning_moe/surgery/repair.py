"""Least-squares repair: refit each expert's W_down so that the kept channels give its old output (method, section 5).

E experts, C channels of a layer, n channels of one expert (k kept), H hidden.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lightning_moe.calibration.collector import Batch
from lightning_moe.calibration.gram import HIDDEN_CHANNELS, LayerGram, iterate_grams
from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.calibration.routed import down_rows
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import MoeLayer, expert_widths, model_shape, moe_layers
from lightning_moe.progress import hidden
from lightning_moe.quantization.nf4 import check_hidden_size
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.after_nf4 import RoundedChannels, rounded_rows
from lightning_moe.surgery.least_squares import ExpertRepair, refit_rows, repaired_down_rows, unchanged_rows

log = logging.getLogger(__name__)


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


def has_rows_to_fit(plan: PrunePlan, *, after_nf4: bool = False) -> bool:
    """Whether a repair can change anything: not where whole experts go and the others keep all their channels."""
    indices = range(len(plan.keep))
    return any(_experts_to_fit(plan, layer_index=index, whole_too=after_nf4) for index in indices)


def plan_repair(
    model: PreTrainedModel,
    *,
    plan: PrunePlan,
    loaders: Mapping[str, Iterable[Batch]],
    memory_gb: float = 4.0,
    after_nf4: bool = False,
    grams: Iterable[LayerGram] | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Repair:
    """New down rows for the cut of `plan`; the model itself is not changed (`apply_plan(..., repair=...)` does that).

    With `after_nf4` the rows are for an expert that is packed afterwards: they reproduce its old output from the kept
    channels as their 4-bit gate and up rows give them, `W' = argmin || H_q W'^T - H W^T ||^2`, and are rounded with
    error feedback (`rounded_rows`). Then experts that keep all channels are repaired too, and a plan that cuts nothing
    is one of compensation alone. Errors in the summary do not count the rounding of W'.

    Several processes share the batches, and then the experts: each solves for its own, and all get the same rows.

    Args:
        model: the model the plan was made for, uncut.
        plan: which channels stay.
        loaders: corpus name -> batches, as for `collect_statistics`.
        memory_gb: GiB for the Gram matrices of one pass (`iterate_grams`); of `n^2` numbers an expert, after NF4
            `(n + k)^2`.
        after_nf4: fit to gate and up rows in 4 bit; the caller packs the model after the cut.
        grams: of all experts' channels, where several plans share them; not after NF4. Not given: taken from `loaders`.
        progress: show a progress bar.
        processes: those that share the work; each has the whole model, the same plan and the same loaders.

    Raises:
        ValueError: the plan was made for another model, one layer needs more than `memory_gb`, the model cannot be
            packed, or `grams` are given to a repair after NF4.
    """
    plan.check_fits(model_shape(model))
    layers, rows, numbers = moe_layers(model), [], []
    rounded = _rounded_channels(plan, grams=grams) if after_nf4 else None
    if grams is None:
        grams = iterate_grams(
            model,
            loaders=loaders,
            memory_gb=memory_gb,
            experts=[_experts_to_fit(plan, layer_index=layer.index, whole_too=after_nf4) for layer in layers],
            columns=rounded or HIDDEN_CHANNELS,
            progress=progress,
            processes=processes,
        )
    fitting = tqdm(layers, desc="Fitting down projections", disable=hidden(progress=progress))
    for layer, gram in zip(fitting, grams, strict=True):
        keep_C = plan.keep[layer.index]
        repairs = repair_layer(layer, gram=gram, keep_C=keep_C, after_nf4=after_nf4, processes=processes)
        if rounded is not None:
            rounded.forget(layer)
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


def _rounded_channels(plan: PrunePlan, *, grams: Iterable[LayerGram] | None) -> RoundedChannels:
    check_hidden_size(plan.shape.hidden_size)
    if grams is not None:
        raise ValueError("`grams` are of 16-bit channels, and a repair after NF4 takes its own: leave them out.")
    return RoundedChannels(plan=plan)


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
    layer: MoeLayer, *, gram: LayerGram, keep_C: Tensor, after_nf4: bool = False, processes: Processes = ALONE
) -> list[ExpertRepair]:
    """Repairs of all experts of one layer, in the router's order; an evicted expert has no rows.

    Rows are on the CPU, in the weights' type (fp32 for packed experts). Of several processes each solves for every
    `size`-th expert; rows and errors of the others are 0 here. After NF4 the Grams are those of `RoundedChannels`.
    """
    experts = layer.experts
    packed = isinstance(experts, ChannelExperts) and experts.packed
    dtype = torch.float32 if packed else next(experts.parameters()).dtype
    repairs = []
    for expert, keep_n in enumerate(keep_C.split(expert_widths(experts))):
        down_nH = down_rows(experts, expert, dtype=dtype).detach()
        if expert % processes.size != processes.rank:
            repairs.append(unchanged_rows(torch.zeros_like(down_nH[keep_n])))
        elif after_nf4:
            repairs.append(_fit_rounded(gram, expert=expert, down_nH=down_nH, keep_n=keep_n))
        else:
            repairs.append(_fit_channels(gram, expert=expert, down_nH=down_nH, keep_n=keep_n))
    return repairs


def _fit_channels(gram: LayerGram, *, expert: int, down_nH: Tensor, keep_n: Tensor) -> ExpertRepair:
    return repaired_down_rows(
        down_nH=down_nH,
        keep_n=keep_n,
        half_a=gram.half_a[expert],
        half_b=gram.half_b[expert],
        num_tokens=gram.counts[expert],
    )


def _fit_rounded(gram: LayerGram, *, expert: int, down_nH: Tensor, keep_n: Tensor) -> ExpertRepair:
    if not bool(keep_n.any()):
        return unchanged_rows(down_nH[keep_n])
    one = refit_rows(
        kept_kH=down_nH[keep_n],
        lost_dH=down_nH,
        half_a=gram.half_a[expert],
        half_b=gram.half_b[expert],
        num_tokens=gram.counts[expert],
        num_channels=len(keep_n),
    )
    if one.ridge is None:
        return one
    kept = slice(len(one.down_rows))
    gram_kk = gram.half_a[expert][kept, kept] + gram.half_b[expert][kept, kept]
    rows_kH = rounded_rows(one.down_rows.to(gram_kk), gram_kk=gram_kk, ridge=one.ridge)
    return replace(one, down_rows=rows_kH.to(one.down_rows))


def _experts_to_fit(plan: PrunePlan, *, layer_index: int, whole_too: bool) -> tuple[int, ...]:
    """Experts that lose some of their channels, but not all, and with `whole_too` those that lose none."""
    widths = zip(plan.widths(layer_index), plan.shape.layers[layer_index].widths, strict=True)
    return tuple(expert for expert, (kept, width) in enumerate(widths) if kept and (whole_too or kept < width))
