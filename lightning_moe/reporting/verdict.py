"""What a comparison says, in sentences: what is best, by how much, what repair and 4 bit cost, which row to take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from math import exp, fsum

from lightning_moe.reporting.comparison import DENSE, Comparison, Setting, Spread, Variant
from lightning_moe.reporting.words import enumerate_words

# The row to take is the smallest that loses at most this, nats per token: a twentieth more perplexity.
TOLERANCE = 0.05
# Claims worth a sentence: one method, another, what the first is.
_DUELS = (
    ("exact_global", "paper_a", "Exact ablation against paper A's published method"),
    ("channel_coverage", "exact_global", "Channel coverage over corpora against one global ranking"),
    ("tb_coverage", "reap", "Paper B's coverage against the single score it is built on"),
)


@dataclass(frozen=True, kw_only=True)
class Duel:
    """Two rows of 16 bit that differ in the method alone: losses above dense, nats per token."""

    claim: str
    methods: tuple[str, str]
    ratio: float
    repair: bool
    losses: tuple[Spread, Spread]

    @property
    def share(self) -> float:
        """The first loss over the second; NaN where the second lost nothing."""
        first, second = self.losses
        return first.mean / second.mean if second.mean > 0 else float("nan")

    @property
    def is_clear(self) -> bool:
        """No sample of one lies between the samples of the other."""
        first, second = self.losses
        return first.high < second.low or second.high < first.low


def verdict(comparison: Comparison) -> tuple[str, ...]:
    """The sentences, the one to act on first; what was not measured is not said."""
    return (
        *_take(comparison),
        *_dense(comparison),
        *(sentence for ratio in _ratios(comparison) for sentence in _best(comparison, ratio=ratio)),
        *_claims(duels(comparison)),
        *_repair(comparison),
        *_packing(comparison),
    )


def duels(comparison: Comparison) -> list[Duel]:
    """Every pair that tests one of the papers' claims or ours, by claim, repair and ratio."""
    losses = {variant.setting: comparison.loss(variant) for variant in comparison.variants}
    found = []
    for (first, second, claim), repair in product(_DUELS, (False, True)):
        for ratio in _ratios(comparison):
            pair = [losses.get(Setting(method=name, ratio=ratio, bits=16, repair=repair)) for name in (first, second)]
            if pair[0] is not None and pair[1] is not None:
                methods = (first, second)
                own = Duel(claim=claim, methods=methods, ratio=ratio, repair=repair, losses=(pair[0], pair[1]))
                found.append(own)
    return found


def _ratios(comparison: Comparison) -> list[float]:
    return sorted({v.setting.ratio for v in comparison.variants if v.setting.ratio and v.setting.method != DENSE})


def _measured(comparison: Comparison, variants: Sequence[Variant]) -> list[tuple[Spread, Variant]]:
    """(loss, variant), lowest loss first, without the models that broke."""
    pairs = [(comparison.loss(variant), variant) for variant in variants]
    return sorted([(loss, own) for loss, own in pairs if loss is not None], key=lambda pair: pair[0].mean)


def smaller(comparison: Comparison, *, variant: Variant) -> float | None:
    """How many times fewer bytes than the dense model; None where either is not known."""
    size = variant.spread(lambda row: row.bytes)
    return comparison.dense.bytes / size.mean if size and size.mean and comparison.dense.bytes else None


def _size(comparison: Comparison, *, variant: Variant) -> str:
    times, size = smaller(comparison, variant=variant), variant.spread(lambda row: row.bytes)
    return f"{size.mean / 1e6:,.2f} MB, {times:.2f} times smaller than dense" if times and size else ""


def _take(comparison: Comparison) -> Iterator[str]:
    """The smallest model that loses little, and the smallest of all."""
    measured = _measured(comparison, comparison.variants)
    sized = [(size.mean, loss, own) for loss, own in measured if (size := own.spread(lambda row: row.bytes))]
    good = [entry for entry in sized if entry[1].mean <= TOLERANCE]
    if not good:
        if measured:
            loss, best = measured[0]
            yield (
                f"No row stays within {TOLERANCE} nats per token of the dense model; the closest is "
                f"{best.setting.label} with {loss.mean:.4f}."
            )
        return
    _, loss, best = min(good, key=lambda entry: (entry[0], entry[1].mean))
    yield (
        f"Take {best.setting.label}: the smallest row within {TOLERANCE} nats per token of the dense model "
        f"({100 * (exp(TOLERANCE) - 1):.0f} % of its perplexity). It loses {loss.mean:.4f} and has "
        f"{_size(comparison, variant=best) or 'a size that was not measured'}."
    )


def _dense(comparison: Comparison) -> Iterator[str]:
    dense, count = comparison.dense, comparison.num_samples
    samples = (
        f"Numbers are means over {count} calibration samples." if count > 1 else "One calibration sample was used."
    )
    size = f" and has {dense.bytes / 1e6:,.2f} MB" if dense.bytes else ""
    perplexity = f" (perplexity {exp(dense.nll):.4g})" if dense.nll < 100 else ""
    yield f"The dense model has a loss of {dense.nll:.4f} nats per token on held-out text{perplexity}{size}. {samples}"


def _best(comparison: Comparison, *, ratio: float) -> Iterator[str]:
    """The best one-shot row of 16 bit at a ratio, and the best of another method."""
    same = [v for v in comparison.variants if v.setting.ratio == ratio and v.setting.bits == 16]
    measured = _measured(comparison, [v for v in same if v.setting.method != DENSE and not v.setting.recovered])
    if not measured:
        return
    loss, best = measured[0]
    text = (
        f"At prune ratio {ratio:.2f} in 16 bit, {best.setting.line.label} is best: it loses {_loss(loss)} above dense"
    )
    second = next(((other, own) for other, own in measured if own.setting.method != best.setting.method), None)
    if second is not None:
        text += f"; the next method is {second[1].setting.line.label}: {_loss(second[0])}{_beyond(loss, second[0])}"
    yield text + "."


def _loss(loss: Spread) -> str:
    spread = f" ({loss.low:.4f} to {loss.high:.4f})" if loss.high > loss.low else ""
    return f"{loss.mean:.4f}{spread}"


def _beyond(better: Spread, other: Spread) -> str:
    """Whether a difference is more than what the samples differ by."""
    return ", within the spread of the samples" if other.low < better.high else ""


def _claims(pairs: Sequence[Duel]) -> Iterator[str]:
    """One sentence for each claim, over all ratios: of rows without repair where there are such."""
    for (claim, methods), group in groupby(pairs, key=lambda duel: (duel.claim, duel.methods)):
        every = list(group)
        own = [duel for duel in every if not duel.repair] or every
        shares = enumerate_words([f"{duel.share:.2f}" for duel in own])
        at = enumerate_words([f"{duel.ratio:.2f}" for duel in own])
        unclear = [f"{duel.ratio:.2f}" for duel in own if not duel.is_clear]
        note = f"; within the spread of the samples at {enumerate_words(unclear)}" if unclear else ""
        yield (
            f"{claim}, {'both' if own[0].repair else 'neither'} repaired: {methods[0]} loses {shares} of what "
            f"{methods[1]} loses above dense, at prune ratio {at}{note}."
        )


def _gain(comparison: Comparison, *, change: dict[str, object]) -> list[float]:
    """Loss above dense of every row with `change` made over the loss of the row without it."""
    settings = {variant.setting: comparison.loss(variant) for variant in comparison.variants}
    shares = []
    for setting, loss in settings.items():
        changed = settings.get(replace(setting, **change)) if setting.method != DENSE else None
        if loss is not None and changed is not None and loss.mean > 0 and replace(setting, **change) != setting:
            shares.append(changed.mean / loss.mean)
    return shares


def _repair(comparison: Comparison) -> Iterator[str]:
    shares = _gain(comparison, change={"repair": True})
    if shares:
        yield (
            f"Least-squares repair leaves {fsum(shares) / len(shares):.0%} of the loss above dense on average "
            f"({min(shares):.0%} to {max(shares):.0%} over {len(shares)} pairs of rows)."
        )


def _packing(comparison: Comparison) -> Iterator[str]:
    pairs = {v.setting: comparison.loss(v) for v in comparison.variants if v.setting.method != DENSE}
    added = [
        packed.mean - loss.mean
        for setting, loss in pairs.items()
        if setting.bits == 16 and loss and (packed := pairs.get(replace(setting, bits=4))) is not None
    ]
    if added:
        yield (
            f"NF4 adds {fsum(added) / len(added):.4f} nats per token on average ({min(added):.4f} to {max(added):.4f} "
            f"over {len(added)} pairs of rows)."
        )
