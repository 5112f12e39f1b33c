"""What was cut: a table of all plans, sentences and figures of the first ones."""

# C channels of a layer, E experts

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

from tqdm.auto import tqdm

from lightning_moe.allocation.usage import active_channels, rerouted, usage_shares
from lightning_moe.criteria import CHANNEL_CRITERIA, EXPERT_CRITERIA
from lightning_moe.progress import hidden
from lightning_moe.records import CalibrationStatistics, ChannelScores, ExpertScores, PrunePlan
from lightning_moe.reporting import figures
from lightning_moe.reporting.page import Block, Picture, bullets, folded, html_table, paragraph
from lightning_moe.reporting.table import Column
from lightning_moe.reporting.words import enumerate_words, plan_in_words

# One unit for all layers and all methods, so that plans can be compared; and paper A's weight of an expert.
CURVE_CRITERION, EXPERT_WEIGHT = "channel_ablation", "attribution"
# Each takes a megabyte of figures.
MOST_DETAILED = 4
# A longer list is folded.
_FEW_LAYERS = 12

_CAPTIONS = {
    "widths": "Each cell is one expert: the brighter, the more of its channels stay; a white cross marks an expert "
    "that is gone as a whole.",
    "weights": "Above, how much each layer matters by its loss, raw and as smoothed by paper A; below, the share of "
    "its channels that the plan keeps (bars) and the share of its score that they hold (line): a line far above its "
    "bar is a layer that was cheap to cut.",
    "experts": "Each line is one expert, the darker the more it matters: a line that rises steeply is an expert whose "
    "work a few channels do, its dot is the width that the plan keeps, and a dashed line is an expert that is gone.",
    "curves": "Each line is one layer: the steeper it rises, the fewer channels do the work; the dot is the share of "
    "channels that the plan keeps and the share of the score that they hold.",
    "usage": "Each mark is one expert: the further right, the more tokens were routed to it, and the higher, the more "
    "of it stays; a cross far to the right would be a busy expert that was lost.",
    "kept": "Each bar is one layer: layers above the dashed line were spared, layers below it paid for them.",
}
_COLUMNS = (
    Column(key="name", header="plan", left=True),
    Column(key="method", header="method", left=True),
    Column(key="prune_ratio", header="prune ratio asked", text="{:.2f}".format),
    Column(key="stored", header="channels stored", text="{:.1%}".format),
    Column(key="active", header="channels active per token", text="{:.1%}".format),
    Column(key="lost", header="experts lost", text="{:,}".format),
    Column(key="layers", header="a layer keeps (least / median / most)"),
)
_TABLE_TEXT = (
    "Stored is the share of the routed experts' channels that stays in the file; active is the share of the channels "
    "that a token of the calibration text runs through, when the experts that stay take over from those that are lost: "
    "where rarely used experts are cut, the file shrinks more than the work."
)


def plan_block(plans: Mapping[str, PrunePlan], *, statistics: CalibrationStatistics | None) -> Block:
    """The table of all plans, then words and figures of the first different ones that remove something."""
    rows = [plan_row(name, plan=plan, statistics=statistics) for name, plan in plans.items()]
    parts, pictures = [html_table(rows, columns=_COLUMNS), paragraph(_TABLE_TEXT)], []
    detailed = different_plans(plans)
    worth = _Worth.of(statistics) if statistics is not None and detailed else None
    shown = tqdm(detailed[:MOST_DETAILED], unit=" plans", desc="figures", disable=hidden(progress=True))
    for index, (names, plan) in enumerate(shown):
        own = _pictures(plan, worth=worth, prefix=f"plan_{index}_")
        pictures += own
        parts.append(_details(names, plan=plan, pictures=own, is_open=index == 0))
    if len(detailed) > MOST_DETAILED:
        left = [names[0] for names, _ in detailed[MOST_DETAILED:]]
        parts.append(paragraph(f"Without figures here, to keep the page small: {enumerate_words(left)}."))
    return Block(title="What was cut", parts=parts, pictures=pictures)


def different_plans(plans: Mapping[str, PrunePlan]) -> list[tuple[list[str], PrunePlan]]:
    """(names, plan) of the plans that remove something; several names where they keep the same channels."""
    named: dict[str, tuple[list[str], PrunePlan]] = {}
    for name, plan in plans.items():
        if plan.num_kept < plan.shape.num_channels:
            named.setdefault(plan.digest, ([], plan))[0].append(name)
    return list(named.values())


def plan_row(name: str, *, plan: PrunePlan, statistics: CalibrationStatistics | None) -> dict[str, Any]:
    """What the table says of a plan."""
    kept = [float(keep_C.double().mean()) for keep_C in plan.keep]
    return {
        "name": name,
        "method": plan.method,
        "prune_ratio": plan.prune_ratio,
        "stored": plan.num_kept / plan.shape.num_channels,
        "active": None if statistics is None else active_share(plan, statistics=statistics),
        "lost": sum(len(plan.evicted(index)) for index in range(len(kept))),
        "layers": f"{min(kept):.0%} / {median(kept):.0%} / {max(kept):.0%}",
    }


def active_share(plan: PrunePlan, *, statistics: CalibrationStatistics) -> float:
    """Share of the routed experts' channels a token runs through that stays.

    Experts that stay take over from lost ones: see `lightning_moe.allocation.usage.rerouted`.
    """
    usage = usage_shares(statistics)
    widths = [plan.widths(index) for index in range(len(plan.shape.layers))]
    before = [layer.widths for layer in plan.shape.layers]
    left = active_channels(widths, usage=rerouted(usage, widths=widths, before=before))
    return left / active_channels(before, usage=usage)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Worth:
    """Statistics, and what they say of channels and experts."""

    statistics: CalibrationStatistics
    scores: ChannelScores
    weights: ExpertScores

    @classmethod
    def of(cls, statistics: CalibrationStatistics) -> Self:
        """In the units of all plans."""
        scores = CHANNEL_CRITERIA[CURVE_CRITERION](statistics)
        return cls(statistics=statistics, scores=scores, weights=EXPERT_CRITERIA[EXPERT_WEIGHT](statistics))


def _pictures(plan: PrunePlan, *, worth: _Worth | None, prefix: str) -> list[Picture]:
    made = {"widths": figures.width_heatmap(plan)}
    if worth is None:
        made["kept"] = figures.kept_share(plan)
    else:
        made["weights"] = figures.layer_weights(worth.statistics, plan=plan, scores=worth.scores)
        made["experts"] = figures.expert_curves(worth.scores, weights=worth.weights, plan=plan)
        made["curves"] = figures.score_curves(worth.scores, plan=plan)
        made["usage"] = figures.usage_against_width(worth.statistics, plan=plan)
    return [Picture.of(prefix + name, figure=figure, caption=_CAPTIONS[name]) for name, figure in made.items()]


def _details(names: Sequence[str], *, plan: PrunePlan, pictures: Sequence[Picture], is_open: bool) -> str:
    whole, *layers = plan_in_words(plan)
    same = [paragraph(f"The same channels: {enumerate_words(names[1:])}.")] if len(names) > 1 else []
    said = bullets(layers)
    said = said if len(layers) <= _FEW_LAYERS else folded("Layer by layer", parts=[said])
    parts = [paragraph(whole), *same, said, *(picture.html() for picture in pictures)]
    return folded(f"{names[0]} ({plan.method}, prune ratio {plan.prune_ratio:.2f})", parts=parts, is_open=is_open)
