"""Cut channels and experts under an adapter.  E experts, C channels of a layer, H hidden, r rank."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_moe.adapters.experts import DoraExperts
from lightning_moe.adapters.functional import safe_norm
from lightning_moe.adapters.step import PER_CHANNEL
from lightning_moe.models.channel_experts import ChannelExperts

SelectRows = Callable[..., tuple[ChannelExperts, Tensor]]


@torch.no_grad()
def cut_dora_experts(
    layer: DoraExperts, *, keep_C: Tensor, kept_experts: Sequence[int], select_rows: SelectRows
) -> DoraExperts:
    """The adapter and its base with the kept channels: the same function as masking the others.

    Gate and up: rows of B and magnitudes are selected. Down: rows of A are selected, and since the norm of every output
    shrinks with its lost inputs, `m *= ||W_kept + s B A_kept|| / ||W + s B A||` with the present, adapted norms
    (stack.md: output error 0.43 without, 0.00 with). Only the active adapter is kept; its rank does not change.

    Args:
        layer: the adapted experts; their base is given up.
        keep_C: boolean, channels expert by expert in the router's order.
        kept_experts: experts that stay, ascending (all of them under a grouped router: width 0 is masked).
        select_rows: cuts the base and says which rows it took: `surgery.cut.select_rows`.

    Raises:
        ValueError: no adapter is active.
    """
    adapter = layer.adapter_in_use()
    if adapter is None:
        raise ValueError(
            "The layer has no active adapter: enable it (`enable_adapters`, `set_adapter`) before the cut."
        )
    experts, old = layer.experts, layer.adapter_parameters(adapter)
    old_norm_EH = layer.adapted_down_norm(adapter)
    base, row_index = select_rows(experts, keep_C=keep_C, kept_experts=list(kept_experts))
    old_slots = [experts.slot_order.index(kept_experts[position]) for position in base.slot_order]
    row_index, slot_index = (torch.as_tensor(index, device=old_norm_EH.device) for index in (row_index, old_slots))
    cut = layer.rebuilt(base, adapter)
    new = cut.adapter_parameters(adapter)
    for name, value in new.items():
        value.copy_(old[name].index_select(0, row_index if name in PER_CHANNEL else slot_index))
    if "lora_magnitude_down" in new:
        new["lora_magnitude_down"].mul_(cut.adapted_down_norm(adapter) / safe_norm(old_norm_EH[slot_index]))
    return cut
