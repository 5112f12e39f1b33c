"""What calibration saw: what experts and channels are worth, what the routers do."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from lightning_moe.criteria import CHANNEL_CRITERIA
from lightning_moe.records import CalibrationStatistics
from lightning_moe.reporting import figures
from lightning_moe.reporting.figures.routing import Depth
from lightning_moe.reporting.page import Block, Picture, paragraph

# Paper A's own channel metric: its figure 4 orders channels by it.
_ORDER = "activation_norm"
_SCORES = "channel_ablation"

_CAPTIONS = {
    "expert_scores": "Each mark is one expert: were usage or router weight a good score, the marks would lie on the "
    "dotted line; below it are experts that are used more than they matter, and the right panel says how far the two "
    "orders agree (1: the same, 0: not at all).",
    "cut_cost": "Each line is one layer whose channels go one by one, the lowest score first: left, what is left of "
    "its score, right, what its output loses (removed channels added up, cross terms between them left out); the "
    "dashed line is the least that any order of channels loses.",
    "concentration": "The further a line lies above the dotted one of its colour, the fewer channels of the layer do "
    "the work, and the cheaper the others are to remove.",
    "smoothings": "Each line is one way to turn the layers' losses into weights for paper A's coverage: a layer above "
    "1 is protected, and the flatter a line, the less the method tells layers apart.",
    "entropy_depth": "The higher, the less a layer's router prefers single experts on that text; colours are corpora, "
    "and where there are two lines of a colour, the dotted one is the dense model.",
    "entropy": "Each line is one corpus: mass on the left means that the router is sure of one expert, mass on the "
    "right that it hardly prefers any.",
    "activations": "The higher, the larger the experts' activations in that layer on that text; lines that part are "
    "corpora that use the layer differently.",
    "routing": "Mean entropy of each layer's router on held-out text before training (dotted) and after it (solid), a "
    "colour per corpus.",
}


def _picture(name: str, *, figure: Figure) -> Picture:
    return Picture.of(name, figure=figure, caption=_CAPTIONS[name])


def calibration_blocks(
    statistics: CalibrationStatistics | None,
    *,
    after: CalibrationStatistics | None = None,
    routing: Mapping[str, Depth] | None = None,
) -> list[Block]:
    """What channels and experts are worth, and what the routers do.

    Args:
        statistics: Of the dense model.
        after: Of the cut model.
        routing: Mean router entropies on held-out text by corpus and layer, under the names of two times: before and
            after training.
    """
    blocks = [_worth_block(statistics)] if statistics is not None else []
    pictures = [] if statistics is None else _router_pictures(statistics, after=after)
    if routing:
        first, last = routing
        figure = figures.entropy_depth(routing[first], after=routing[last], labels=(first, last))
        pictures.append(_picture("routing", figure=figure))
    if pictures:
        parts = [picture.html() for picture in pictures]
        blocks.append(Block(title="Routers and activations", parts=parts, pictures=pictures))
    return blocks


def _worth_block(statistics: CalibrationStatistics) -> Block:
    tokens = {corpus: int(layers[0]["num_tokens"]) for corpus, layers in statistics.corpora.items()}
    seen = f"Calibration saw {', '.join(f'{count:,} tokens of {corpus}' for corpus, count in tokens.items())}."
    scores, order = (CHANNEL_CRITERIA[name](statistics) for name in (_SCORES, _ORDER))
    made: Mapping[str, Figure] = {
        "expert_scores": figures.expert_scores(statistics),
        "concentration": figures.concentration(scores),
        "cut_cost": figures.cut_cost(order, statistics=statistics),
        "smoothings": figures.smoothings(statistics),
    }
    pictures = [_picture(name, figure=figure) for name, figure in made.items()]
    parts = [paragraph(seen), *(picture.html() for picture in pictures)]
    return Block(title="What experts and channels are worth", parts=parts, pictures=pictures)


def _router_pictures(statistics: CalibrationStatistics, *, after: CalibrationStatistics | None) -> list[Picture]:
    cut = {} if after is None else figures.mean_entropies(after)
    labels = ("dense model", "cut model")
    return [
        _picture(
            "entropy_depth", figure=figures.entropy_depth(figures.mean_entropies(statistics), after=cut, labels=labels)
        ),
        _picture("entropy", figure=figures.router_entropy(statistics)),
        _picture("activations", figure=figures.activation_depth(statistics, after=after)),
    ]
