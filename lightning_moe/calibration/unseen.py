"""Experts that a calibration saw nothing of.  E experts of a layer."""

import logging

from lightning_moe.records import CalibrationStatistics

log = logging.getLogger(__name__)


def unseen_experts(statistics: CalibrationStatistics) -> list[tuple[str, int]]:
    """Name of the layer and number of each expert that no token of any corpus was routed to."""
    counts = [sums["count"].tolist() for sums in statistics.total()]
    return [
        (layer.name, expert)
        for layer, count_E in zip(statistics.shape.layers, counts, strict=True)
        for expert, count in enumerate(count_E)
        if count == 0
    ]


def report_unseen(statistics: CalibrationStatistics) -> None:
    """Says what follows for them, in a line; nothing where every expert got a token."""
    unseen = unseen_experts(statistics)
    if not unseen:
        return
    num_experts = sum(layer.num_experts for layer in statistics.shape.layers)
    num_tokens = sum(int(layers[0]["num_tokens"]) for layers in statistics.corpora.values())
    name, expert = unseen[0]
    log.warning(
        "%d of %d experts got none of the %d calibration tokens (the first is expert %d of %s): what is scored by "
        "activations scores 0 there and goes first, and a repair leaves their rows alone. More text tells them apart.",
        len(unseen),
        num_experts,
        num_tokens,
        expert,
        name,
    )
