"""Where in a model NaN or infinity comes up first.

E experts, C channels of a layer, H hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_moe.calibration.routed import effective_matrices
from lightning_moe.models.discovery import MoeLayer, expert_widths

# Sums of an expert's own activations: nothing of its neighbours or of the rest of the layer is in them.
_OF_EXPERTS = ("norm", "sq_norm", "max_abs")
_OF_CHANNELS = ("gate_sq", "up_sq", "hidden_sq")
_MOST_NAMED = 8


class NonFiniteError(ValueError):
    """NaN or infinity in a layer.

    Args:
        message: for people.
        layer: full name of the first layer that has it.
        place: where in the layer.
    """

    def __init__(self, message: str, *, layer: str, place: str) -> None:
        super().__init__(message)
        self.layer = layer
        self.place = place


def nonfinite_place(layer: MoeLayer, sums: Mapping[str, Tensor]) -> str:
    """Words for where in a layer its statistics stopped being finite.

    In the order in which a layer computes: what its router gets and gives, then single experts, then their weighted
    sum and the layer's output.

    Args:
        layer: the first layer whose sums are not finite.
        sums: its statistics by name, as the calibration adds them up.
    """
    if not _finite(sums["router_probability"]):
        weights = all(_finite(parameter) for parameter in layer.router.parameters())
        return "what goes into its router" if weights else "its router, whose weights are not finite"
    broken = nonfinite_experts(layer, sums)
    if not broken:
        return "the sum of its experts or the output of the decoder layer"
    damaged = [expert for expert in broken if not _finite_weights(layer, expert)]
    if damaged:
        return f"{_named(damaged)}, whose weights are not finite"
    return f"{_named(broken)}, whose weights are finite (an overflow)"


def nonfinite_experts(layer: MoeLayer, sums: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The experts whose own activations are not finite, ascending."""
    widths = expert_widths(layer.experts)
    finite_E = torch.stack([sums[name].isfinite().cpu() for name in _OF_EXPERTS]).all(0)
    finite_C = torch.stack([sums[name].isfinite().cpu() for name in _OF_CHANNELS]).all(0)
    channels_E = torch.stack([part.all() for part in finite_C.split(widths)])
    return tuple((~(finite_E & channels_E)).nonzero().flatten().tolist())


def _finite_weights(layer: MoeLayer, expert: int) -> bool:
    matrices = effective_matrices(layer.experts, expert, dtype=torch.float32)
    return all(_finite(matrix_nH) for matrix_nH in matrices)


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _named(experts: list[int] | tuple[int, ...]) -> str:
    if len(experts) == 1:
        return f"expert {experts[0]}"
    shown = ", ".join(map(str, experts[:_MOST_NAMED]))
    return f"experts {shown}" + (f" and {len(experts) - _MOST_NAMED} more" if len(experts) > _MOST_NAMED else "")
