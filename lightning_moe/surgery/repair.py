"""Least-squares repair: refit each expert's W_down so that the kept channels give its old output (method, section 5).

E experts, C channels of a layer, n channels of one expert (k kept), H hidden.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lightning_moe.calibration.collector import Batch
from lightning_moe.calibration.gram import iterate_grams
from lightning_moe.calibration.gram_sums import HIDDEN_CHANNELS, GramColumns, LayerGram
from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.calibration.routed import down_rows
from lightning_moe.models.channel_experts import ChannelExperts, DenseRows
from lightning_moe.models.discovery import MoeLayer, expert_widths, model_shape, moe_layers
from lightning_moe.progress import hidden
from lightning_moe.quantization.nf4 import PackedRows, check_hidden_size
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
        return repair_table(zip(self.num_repaired, self.error_before, self.error_after, strict=True))


def repair_table(layers: Iterable[tuple[int, float, float]]) -> str:
    """A line per layer of its number of repaired experts, and of the error before and after (see `Repair`)."""
    lines = [f"{'layer':>5} {'experts repaired':>17} {'error before':>13} {'after':>10} {'left':>7}"]
    for index, (count, before, after) in enumerate(layers):
        left = after / before if before else 1.0
        lines.append(f"{index:>5} {count:>17} {before:>13.3e} {after:>10.3e} {left:>7.1%}")
    return "\n".join(lines)


def has_rows_to_fit(plan: PrunePlan, *, after_nf4: bool = False) -> bool:
    """Whether a repair can change anything: not where whole experts go and the others keep all their channels."""
    indices = range(len(plan.keep))
    return any(experts_to_fit(plan, layer_index=index, after_nf4=after_nf4) for index in indices)


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
        ValueError: the plan was made for another model, one expert needs more than `memory_gb`, the model cannot be
            packed, or `grams` are given to a repair after NF4.
    """
    plan.check_fits(model_shape(model))
    layers, found = moe_layers(model), []
    if grams is None:
        grams = iterate_grams(
            model,
            loaders=loaders,
            memory_gb=memory_gb,
            experts=[experts_to_fit(plan, layer_index=layer.index, after_nf4=after_nf4) for layer in layers],
            columns=repair_columns(plan, after_nf4=after_nf4),
            progress=progress,
            processes=processes,
        )
    elif after_nf4:
        raise ValueError("`grams` are of 16-bit channels, and a repair after NF4 takes its own: leave them out.")
    parts = groupby(grams, key=lambda gram: gram.layer_index)
    fitting = tqdm(layers, desc="Fitting down projections", disable=hidden(progress=progress))
    for layer, (index, of_layer) in zip(fitting, parts, strict=True):
        assert index == layer.index
        keep_C = plan.keep[layer.index]
        rows_kH = torch.zeros(int(keep_C.sum()), plan.shape.hidden_size, dtype=_row_dtype(layer))
        rows_by_expert = rows_kH.split(plan.widths(layer.index))
        errors = repair_layer(
            layer,
            grams=of_layer,
            keep_C=keep_C,
            place=lambda expert, own_kH, into=rows_by_expert: into[expert].copy_(own_kH),
            after_nf4=after_nf4,
            processes=processes,
        )
        found.append((rows_kH, errors))
    repair = Repair(
        plan_digest=plan.digest,
        down_rows=tuple(rows_kH for rows_kH, _ in found),
        error_before=tuple(errors.before for _, errors in found),
        error_after=tuple(errors.after for _, errors in found),
        num_repaired=tuple(errors.num_repaired for _, errors in found),
    )
    log.info("Repair of W_down, predicted error per token:\n%s", repair.summary())
    return repair


def repair_columns(plan: PrunePlan, *, after_nf4: bool) -> GramColumns:
    """What the Grams of a repair are of.

    Raises:
        ValueError: the model cannot be packed.
    """
    if not after_nf4:
        return HIDDEN_CHANNELS
    check_hidden_size(plan.shape.hidden_size)
    return RoundedChannels(plan=plan)


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Errors of one layer per token before and after its repair (see `Repair`), and how many experts got new rows."""

    before: float
    after: float
    num_repaired: int


def repair_layer(
    layer: MoeLayer,
    *,
    grams: Iterable[LayerGram],
    keep_C: Tensor,
    place: Callable[[int, Tensor], object],
    after_nf4: bool = False,
    processes: Processes = ALONE,
) -> LayerErrors:
    """Fits new down rows, one expert after the other, and hands them to `place`; each process gets those of all.

    Several processes each solve for one expert at a time. After NF4 the Grams are those of `RoundedChannels`.

    Args:
        layer: the layer, uncut; the down rows of an expert may change once they were placed.
        grams: of its experts, one record or several.
        keep_C: channels that stay, expert by expert in the router's order.
        place: takes an expert and its kept rows `[k, H]` on the CPU, in the weights' type (fp32 for packed experts);
            called once for every expert, those that are in no record last, with their rows as they are.
        after_nf4: fit to gate and up rows in 4 bit.
        processes: those that share the experts.
    """
    keep_by_expert, num_tokens = keep_C.split(expert_widths(layer.experts)), 1
    number_E3 = torch.zeros(len(keep_by_expert), 3, dtype=torch.float64)
    left, own_fit = set(range(len(keep_by_expert))), _fit_rounded if after_nf4 else _fit_channels
    for gram in grams:
        num_tokens = gram.num_tokens
        for first in range(0, len(gram.experts), processes.size):
            fitted, found = gram.experts[first : first + processes.size], []
            for position, expert in enumerate(fitted):
                one = own_fit if position == processes.rank else _fit_elsewhere
                down_nH = _old_rows(layer, expert)
                found.append(one(gram, expert=expert, down_nH=down_nH, keep_n=keep_by_expert[expert]))
            for expert, new in zip(fitted, found, strict=True):  # only now, so that all processes fit at the same time
                numbers = [new.error_before, new.error_after, new.ridge is not None]
                number_E3[expert] = _of_all(torch.tensor(numbers, dtype=torch.float64), processes=processes)
                place(expert, _of_all(new.down_rows, processes=processes))
        left -= set(gram.experts)
        del gram  # the next ones are as large
    for expert in sorted(left):
        place(expert, _old_rows(layer, expert)[keep_by_expert[expert]].cpu())
    before, after, repaired = number_E3.sum(0).tolist()
    return LayerErrors(before=before / num_tokens, after=after / num_tokens, num_repaired=int(repaired))


def place_in_layer(experts: ChannelExperts, *, keep_C: Tensor) -> Callable[[int, Tensor], None]:
    """Puts new rows of kept channels where the old ones are, for a cut that follows; packed rows are packed again."""
    experts.origin = replace(experts.origin, refitted=True)
    keep_by_expert, old = keep_C.split(experts.widths), experts.projection("down_proj")

    def place(expert: int, rows_kH: Tensor) -> None:
        index_k = experts.row_range(expert)[0] + keep_by_expert[expert].nonzero().flatten()
        new = PackedRows.pack(rows_kH) if experts.packed else DenseRows(rows_kH)
        for name, value in new.named_parameters():
            stored = old.get_parameter(name).data
            stored[index_k.to(stored.device)] = value.data.to(stored)

    return place


def _fit_elsewhere(gram: LayerGram, *, expert: int, down_nH: Tensor, keep_n: Tensor) -> ExpertRepair:
    """Zeros, in the place of what another process fits."""
    rows_kH = torch.zeros(int(keep_n.sum()), down_nH.shape[1], dtype=down_nH.dtype)
    return ExpertRepair(down_rows=rows_kH, ridge=None, error_before=0.0, error_after=0.0)


def _of_all(value: Tensor, *, processes: Processes) -> Tensor:
    """The sum over the processes, of which one has something else than zeros: exact."""
    if processes.size == 1:
        return value
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    processes.sum_(wide)
    return wide.to(value.dtype)


def _row_dtype(layer: MoeLayer) -> torch.dtype:
    packed = isinstance(layer.experts, ChannelExperts) and layer.experts.packed
    return torch.float32 if packed else next(layer.experts.parameters()).dtype


def _old_rows(layer: MoeLayer, expert: int) -> Tensor:
    return down_rows(layer.experts, expert, dtype=_row_dtype(layer)).detach()


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


def experts_to_fit(plan: PrunePlan, *, layer_index: int, after_nf4: bool = False) -> tuple[int, ...]:
    """Experts that lose some of their channels, but not all, and after NF4 those that lose none."""
    widths = zip(plan.widths(layer_index), plan.shape.layers[layer_index].widths, strict=True)
    return tuple(expert for expert, (kept, width) in enumerate(widths) if kept and (after_nf4 or kept < width))
