"""What a matrix of calibrations asks for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_moe.allocation.budget import check_count, check_prune_ratio
from lightning_moe.allocation.methods.presets import MethodArgs
from lightning_moe.evaluation.compare.rows import StageSpec

ALL, ALL_EACH = "all", "all_each"


@dataclass(frozen=True, kw_only=True)
class MatrixMethod:
    """One method of a matrix.

    Args:
        method: A name of `plan --method`, such as `exact_global`.
        method_args: Settings of the method.
        name: Its name in tables and rows; null: `method`.
    """

    method: str
    method_args: MethodArgs = field(default_factory=dict)
    name: str | None = None

    def stage(self, *, prune_ratio: float) -> StageSpec:
        """The same as one row without repair, checked."""
        return StageSpec(
            name=self.name or self.method,
            prune_ratio=prune_ratio,
            method=self.method,
            method_args=self.method_args,
            repair=False,
        )


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Every method calibrated on each corpus, and on all, at several sizes; evaluated on each held-out corpus.

    A cell is cut in memory, not saved, and not repaired: it asks what the choice of channels owes to the text.
    Of the corpora together there are two calibrations: `all` reads as many tokens as one corpus does, divided evenly,
    `all_each` reads that many of each. The first asks whether several corpora are better than one, the second what more
    text adds.

    Args:
        methods: Presets by name, or `{method, method_args, name}`.
        prune_ratio: Share of routed-expert channels to remove, in (0, 1).
        tokens: Tokens of calibration text, several sizes; multiples of a calibration row, `all` needs a row for each
            corpus.
        smoothings: Paper A's method once with each of these (`sqrt4`, `none`, `sqrt`, `log`, `huber`, `clip`),
            calibrated on `all_each` alone.
        min_widths: The same with each of these minimum widths; one that experts or budget refuse is left out.
        variants: More methods on `all_each` alone.

    Raises:
        ValueError: an empty list, a ratio or size out of range, a name that comes twice, or a refused method.
    """

    methods: list[str | MatrixMethod] = field(default_factory=lambda: ["exact_global", "channel_coverage", "paper_a"])
    prune_ratio: float = 0.5
    tokens: list[int] = field(default_factory=lambda: [1536, 6144, 18432])
    smoothings: list[str] = field(default_factory=list)
    min_widths: list[int] = field(default_factory=list)
    variants: list[str | MatrixMethod] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_prune_ratio(self.prune_ratio)
        if self.prune_ratio == 0:
            raise ValueError("`prune_ratio` of the matrix must be above 0, got 0: nothing would be cut.")
        for name in ("methods", "tokens"):
            if not vars(self)[name]:
                raise ValueError(f"`{name}` of the matrix is an empty list: name at least one.")
        for size in self.tokens:
            check_count(size, name="tokens", lowest=1)
        names = ["dense", *(stage.name for stage in (*self.stages(), *self.variant_stages()))]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"The matrix names {twice} more than once. Give a method another `name`.")

    def stages(self) -> list[StageSpec]:
        """The methods of every calibration."""
        return [_method(one).stage(prune_ratio=self.prune_ratio) for one in self.methods]

    def variant_stages(self) -> list[StageSpec]:
        """The methods of `all_each` alone: settings of paper A's method, and the other variants."""
        swept = [*_sweep("smoothing", self.smoothings), *_sweep("min_width", self.min_widths)]
        return [_method(one).stage(prune_ratio=self.prune_ratio) for one in (*swept, *self.variants)]

    def shares(self, corpora: Sequence[str], *, row_length: int) -> dict[tuple[str, int], dict[str, int]]:
        """Calibration and size -> rows that it reads of each corpus.

        Args:
            corpora: Names of the calibration corpora.
            row_length: Tokens in a row.

        Raises:
            ValueError: a corpus has a name that means something here, or a size is no whole number of rows, or has
                fewer rows than there are corpora.
        """
        taken = sorted({ALL, ALL_EACH} & set(corpora))
        if taken:
            raise ValueError(f"A calibration corpus cannot be called {taken}: that means all of them. Rename it.")
        shares = {}
        for size in sorted(set(self.tokens)):
            rows = _whole_rows(size, row_length=row_length, num_corpora=len(corpora))
            shares |= {(corpus, size): {corpus: rows} for corpus in corpora}
            if len(corpora) > 1:
                shares[ALL, size] = divided(rows, among=corpora)
                shares[ALL_EACH, size] = dict.fromkeys(corpora, rows)
        return shares


def _method(method: str | MatrixMethod) -> MatrixMethod:
    return MatrixMethod(method=method) if isinstance(method, str) else method


def _sweep(setting: str, values: Sequence[Any]) -> list[MatrixMethod]:
    return [
        MatrixMethod(method="paper_a", method_args={setting: value}, name=f"paper_a_{setting}_{value}")
        for value in values
    ]


def _whole_rows(size: int, *, row_length: int, num_corpora: int) -> int:
    rows, rest = divmod(size, row_length)
    if rest or rows < num_corpora:
        raise ValueError(
            f"`tokens` of the matrix must be multiples of a calibration row, {row_length} tokens, and at least one row "
            f"for each of {num_corpora} corpora; got {size}. Give another size or `calibration_sequence_length`."
        )
    return rows


def divided(rows: int, *, among: Sequence[str]) -> dict[str, int]:
    """`rows` divided as evenly as it goes, the first corpora taking what is over."""
    each, over = divmod(rows, len(among))
    return {corpus: each + (index < over) for index, corpus in enumerate(among)}
