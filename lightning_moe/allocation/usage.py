"""How often experts are used, and what their channels cost a token."""

# E experts of a layer; widths are kept channels

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moe.records import CalibrationStatistics, ModelShape


def usage_shares(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> list[Tensor]:
    """Share of the calibration's tokens that were routed to each expert, float64 [E] per layer; it sums to top-k."""
    return [sums["count"] / sums["num_tokens"] for sums in statistics.total(corpora)]


def rerouted(
    usage: Sequence[Tensor], *, widths: Sequence[Sequence[int]], before: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Usage once experts are gone: a token still takes top-k, so those that stay share theirs in proportion.

    An expert is gone where it had channels before and has none now. One that had none was calibrated so: a novice keeps
    its tokens, a masked expert has none.

    An estimate, since only the cut model's router knows. On the shipped model it was 0 to 5 % above what was measured
    (0.1 to 2 % at budgets of 35 to 75 % active), where holding the calibrated gates was up to 11 % below it for
    channels, and by half where whole experts go. Where nobody that stays was ever used, all with channels are used
    alike.

    Args:
        usage: Per layer, the share of tokens routed to each expert [E].
        widths: Per layer, kept channels of each expert, at least one above 0.
        before: The same of the model that was calibrated.

    Examples:
        >>> usage = [torch.tensor([1.0, 0.5, 0.5])]  # top-2: the shares sum to 2
        >>> rerouted(usage, widths=[[0, 8, 8]], before=[[8, 8, 8]])[0].tolist()
        [0.0, 1.0, 1.0]
    """
    return [
        _rerouted(share_E, width_E=torch.tensor(own), before_E=torch.tensor(earlier))
        for share_E, own, earlier in zip(usage, widths, before, strict=True)
    ]


def _rerouted(share_E: Tensor, *, width_E: Tensor, before_E: Tensor) -> Tensor:
    left_E = share_E * ((width_E > 0) | (before_E == 0))
    left_E = left_E if left_E.sum() > 0 else (width_E > 0).to(share_E.dtype)
    return left_E * (share_E.sum() / left_E.sum())


def active_channels(widths: Sequence[Sequence[int]], *, usage: Sequence[Tensor]) -> float:
    """Channels of routed experts that a token uses on average, over all layers: `sum usage * width`.

    Examples:
        >>> active_channels([[4, 2]], usage=[torch.tensor([0.5, 1.0], dtype=torch.float64)])
        4.0
    """
    return sum(
        float(share_E @ torch.tensor(own, dtype=torch.float64)) for share_E, own in zip(usage, widths, strict=True)
    )


def check_usage_weight(usage_weight: float | None) -> None:
    """Refuses a weight outside [0, 1]; None leaves it open.

    Raises:
        ValueError: with the value.
    """
    if usage_weight is None:
        return
    if isinstance(usage_weight, bool) or not isinstance(usage_weight, int | float) or not 0 <= usage_weight <= 1:
        raise ValueError(
            f"`usage_weight` must be in [0, 1], got {usage_weight!r}. 0 counts a channel as one to store, 1 as often "
            "as a token uses it."
        )


def usage_costs(shape: ModelShape, *, usage: Sequence[Tensor], usage_weight: float) -> list[Tensor]:
    """What a channel of each expert costs: `(1 - w) + w * usage / mean usage`, float64 [E] per layer (method, 4).

    The mean is over all channels of the model, so that all of them together cost as many units as there are channels,
    whatever the weight w: 0 counts channels that are stored, 1 channels that a token uses.

    Args:
        shape: The model.
        usage: Per layer, the share of tokens routed to each expert [E].
        usage_weight: w, in [0, 1].
    """
    mean = active_channels([layer.widths for layer in shape.layers], usage=usage) / shape.num_channels
    return [(1 - usage_weight) + usage_weight * share_E / mean for share_E in usage]
