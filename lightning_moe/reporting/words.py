"""Plans and results as sentences.  C channels of a layer."""

from collections.abc import Sequence
from math import exp

from lightning_moe.records import ModelShape, PrunePlan
from lightning_moe.reporting.summary import Result, Summary

_MOST_NAMED = 12
# One-shot comparisons that are worth a sentence: ours, the other, what both are.
_DUELS = (
    ("cut_{}", "paper_a_{}", "our default against paper A's method"),
    ("cut_{}", "paper_a_{}_repaired", "both repaired by least squares"),
    ("cut_{}_unrepaired", "paper_a_{}", "both without repair"),
)


def layer_labels(shape: ModelShape) -> tuple[str, ...]:
    """The layers' numbers in the model, as their names give them; the full names where those are no clear numbers."""
    names = [layer.name for layer in shape.layers]
    numbers = [[part for part in name.split(".") if part.isdigit()] for name in names]
    labels = tuple(found[0] if found else name for found, name in zip(numbers, names, strict=True))
    return labels if len(set(labels)) == len(labels) else tuple(names)


def enumerate_words(words: Sequence[object]) -> str:
    """`3`, `3 and 11`, `3, 5 and 11`.

    Examples:
        >>> enumerate_words(["calibrate", "plan", "prune"])
        'calibrate, plan and prune'
    """
    texts = [str(word) for word in words]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def plan_in_words(plan: PrunePlan) -> tuple[str, ...]:
    """One sentence for the whole plan, then one per layer: what it keeps and which experts it lost."""
    whole = (
        f"{plan.method} was asked to remove {100 * plan.prune_ratio:.0f} % of the routed-expert channels and removes "
        f"{100 * plan.achieved_prune_ratio:.1f} %: {plan.num_kept:,} of {plan.shape.num_channels:,} channels stay, in "
        f"blocks of {plan.align}."
    )
    labels = layer_labels(plan.shape)
    return (whole, *(_layer_in_words(plan, index=index, label=label) for index, label in enumerate(labels)))


def _layer_in_words(plan: PrunePlan, *, index: int, label: str) -> str:
    kept, lost = sum(plan.widths(index)), plan.evicted(index)
    share = kept / plan.shape.layers[index].num_channels
    if not lost:
        fate = "lost no expert"
    elif len(lost) > _MOST_NAMED:
        fate = f"lost {len(lost)} of {plan.shape.layers[index].num_experts} experts"
    else:
        fate = f"lost expert{'s' if len(lost) > 1 else ''} {enumerate_words(lost)}"
    return f"Layer {label} keeps {100 * share:.0f} %, {fate}."


def plan_in_short(plan: PrunePlan, *, name: str) -> str:
    """One sentence about what a plan keeps."""
    kept = [float(keep_C.double().mean()) for keep_C in plan.keep]
    lost = sum(len(plan.evicted(index)) for index in range(len(kept)))
    experts = sum(layer.num_experts for layer in plan.shape.layers)
    labels = layer_labels(plan.shape)
    least, most = (labels[kept.index(share)] for share in (min(kept), max(kept)))
    return (
        f"{name} keeps {100 * plan.num_kept / plan.shape.num_channels:.1f} % of the routed experts' channels: from "
        f"{100 * min(kept):.0f} % (layer {least}) to {100 * max(kept):.0f} % (layer {most}); {lost} of {experts} "
        "experts are gone as a whole."
    )


def headlines(summary: Summary, *, beside_comparison: bool = False) -> tuple[str, ...]:
    """The figures that a reader wants first, one sentence each; what was not measured is not said.

    Args:
        summary: The results.
        beside_comparison: A comparison's own sentences say already what dense is and what is smallest.
    """
    return (
        *([] if beside_comparison else [_dense_sentence(summary)]),
        *_duel_sentences(summary),
        *_recovery_sentences(summary),
        *([] if beside_comparison else _smallest_sentence(summary)),
        *_export_sentence(summary),
    )


def _dense_sentence(summary: Summary) -> str:
    dense = summary.dense
    # exp() of a loss above about 700 has no float64.
    perplexity = f" (perplexity {exp(dense.nll):.4g})" if dense.nll < 100 else ""
    size = f" and has {dense.bytes / 1e6:.2f} MB" if dense.bytes else ""
    return f"The dense model has a loss of {dense.nll:.4f} nats per token on held-out text{perplexity}{size}."


def _duel_sentences(summary: Summary) -> list[str]:
    ratios = dict.fromkeys(
        result.name.removeprefix("paper_a_").split("_")[0]
        for result in summary.others
        if result.name.startswith("paper_a_")
    )
    duels = [
        (summary.find(ours.format(ratio)), summary.find(other.format(ratio)), what)
        for ratio in ratios
        for ours, other, what in _DUELS
    ]
    return [_duel_sentence(summary, ours=ours, other=other, what=what) for ours, other, what in duels if ours and other]


def _duel_sentence(summary: Summary, *, ours: Result, other: Result, what: str) -> str:
    loss, other_loss = summary.loss(ours), summary.loss(other)
    share = f" ({loss / other_loss:.2f} of it)" if other_loss > 0 else ""
    return (
        f"At prune ratio {ours.prune_ratio:.2f}, {what}: {ours.name} loses {loss:.4f} nats per token above dense, "
        f"{other.name} loses {other_loss:.4f}{share}."
    )


def _recovery_sentences(summary: Summary) -> list[str]:
    return [
        f"Recovery closed {percent:.0f} % of the one-shot loss gap to the control ({stage})."
        for stage, percent in summary.gap_closed.items()
    ]


def _smallest_sentence(summary: Summary) -> list[str]:
    sized = [(result.bytes, result) for result in summary.others if result.bytes]
    if not sized:
        return []
    num_bytes, smallest = min(sized, key=lambda pair: (pair[0], pair[1].nll))
    smaller = summary.smaller(num_bytes)
    times = f", {smaller:.2f} times smaller than dense" if smaller else ""
    return [
        f"The smallest is {smallest.name}: {num_bytes / 1e6:.2f} MB{times}, and it loses "
        f"{summary.loss(smallest):.4f} nats per token above dense."
    ]


def _export_sentence(summary: Summary) -> list[str]:
    differences = [export.max_logit_diff for export in summary.exports if export.max_logit_diff is not None]
    if not differences:
        return []
    said = f"Loaded again, the exports' logits differ from the model in memory by at most {max(differences):.3g}"
    medians = [export.median_logit_diff for export in summary.exports if export.median_logit_diff is not None]
    moved = [export.rerouted for export in summary.exports if export.rerouted]
    if medians:
        said += f", for the median token by {max(medians):.3g}"
    if moved:
        said += f"; up to {max(moved):.1%} of tokens go to other experts, because their choice was close"
    return [f"{said}."]
