"""A grid of rows: methods x ratios x samples x repairs x bits."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, Literal, TypeVar

from lightning_moe.allocation import build_method
from lightning_moe.allocation.budget import check_count, resolve_prune_ratio
from lightning_moe.allocation.methods import ExpertMethod
from lightning_moe.allocation.methods.presets import MethodArgs
from lightning_moe.criteria import CHANNEL_CRITERIA
from lightning_moe.evaluation.compare.rows import CONTROL, Repair, StageSpec, row_name

Bits = Literal[4, 16]
T = TypeVar("T")
UNIFORM_WIDTH = "uniform width"
_MOST_SAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class GridMethod:
    """One method of a grid; what is null is the grid's.

    Args:
        method: A name of `plan --method`, such as `exact_global`.
        method_args: Settings of the method.
        name: Its name in tables and rows; null: `method`.
        repair: Which repairs: false, true, after_nf4.
        bits: Which of 16 and 4.
        ratios: Shares of routed-expert channels to remove.
        calibrations: 2 measures the cut model again half-way.
        novices: An expert that goes leaves its mean output behind.
        uniform_row: Also a row with this method's order of channels, and one width for all experts; see `Grid`.
    """

    method: str
    method_args: MethodArgs = field(default_factory=dict)
    name: str | None = None
    repair: list[Repair] | None = None
    bits: list[Bits] | None = None
    ratios: list[float] | None = None
    calibrations: int | None = None
    novices: bool | None = None
    uniform_row: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows for every combination.

    Args:
        methods: Presets by name, or `{method, method_args, name, repair, bits, ratios, ...}`.
        ratios: Shares of routed-expert channels to remove, each in [0, 1).
        keep_ratios: Instead: shares that stay, each in (0, 1].
        bits: 16 (bfloat16 on disk), 4 (NF4), or both.
        repair: Refit the down projections by least squares: false, true, after_nf4 (against the packed rows, 4 bit
            alone), or several of them.
        samples: Samples of the calibration text; each reads the corpora in another order, up to their `max_tokens`.
        calibrations: 2 measures the cut model again half-way.
        novices: An expert that goes leaves its mean output behind.
        uniform_row: For each method with a `criterion` of channels also a row, marked `uniform width`, that takes the
            channels in its order and gives all experts one width: `uniform` with that criterion and `align`, calibrated
            once. Of `uniform` itself there is none.
    """

    methods: list[str | GridMethod]
    ratios: list[float] | None = None
    keep_ratios: list[float] | None = None
    bits: list[Bits] = field(default_factory=lambda: [16])
    repair: list[Repair] = field(default_factory=lambda: [False])
    samples: int = 1
    calibrations: int = 1
    novices: bool = False
    uniform_row: bool = False

    def rows(self) -> list[StageSpec]:
        """All rows, and the dense model in 4 bit where 4 bit is asked for.

        Raises:
            ValueError: an empty list, an unknown method or setting, a ratio out of range, or two rows of one name.

        Examples:
            >>> [row.name for row in Grid(methods=["exact_global", "reap"], ratios=[0.5], bits=[4]).rows()]
            ['dense_nf4', 'exact_global_50_nf4_s0', 'reap_50_nf4_s0']
        """
        check_count(self.samples, name="samples", lowest=1)
        if self.samples > _MOST_SAMPLES:
            raise ValueError(f"`samples` of the grid must be at most {_MOST_SAMPLES}, got {self.samples}.")
        ratios = self._prune_ratios()
        rows = [row for method in self._methods() for row in self._rows_of(method, ratios=ratios)]
        if any(row.bits == 4 for row in rows):
            rows.insert(0, CONTROL)
        _check_unique(rows)
        return rows

    def _prune_ratios(self) -> list[float]:
        if (self.ratios is None) == (self.keep_ratios is None):
            raise ValueError(
                "Give exactly one of `ratios` (shares that go) and `keep_ratios` (shares that stay), got "
                f"ratios={self.ratios} and keep_ratios={self.keep_ratios}."
            )
        if self.keep_ratios is None:
            return _filled(self.ratios, name="ratios")
        kept = _filled(self.keep_ratios, name="keep_ratios")
        return [resolve_prune_ratio(prune_ratio=None, keep_ratio=ratio) for ratio in kept]

    def _methods(self) -> list[GridMethod]:
        methods = _filled(self.methods, name="methods")
        return [GridMethod(method=one) if isinstance(one, str) else one for one in methods]

    def _rows_of(self, method: GridMethod, *, ratios: list[float]) -> Iterator[StageSpec]:
        """Rows of one method, and of its order of channels at one width."""
        uniform = self.uniform_row if method.uniform_row is None else method.uniform_row
        forms = [method]
        settings = asdict(build_method(method.method, **method.method_args))
        if uniform and method.method != "uniform" and settings.get("criterion") in CHANNEL_CRITERIA:
            arguments = {name: settings[name] for name in ("criterion", "align")}
            label = method.name or method.method
            forms.append(replace(method, method="uniform", name=label, method_args=arguments, calibrations=1))
        ratios = ratios if method.ratios is None else _filled(method.ratios, name=f"ratios of {method.method}")
        for sample in range(self.samples):
            for form in forms:
                export = None if form is method else UNIFORM_WIDTH
                yield from self._cells(form, ratios=ratios, sample=sample, export=export)

    def _cells(
        self, method: GridMethod, *, ratios: list[float], sample: int, export: str | None
    ) -> Iterator[StageSpec]:
        """Rows of one method and sample."""
        label = method.name or method.method
        calibrations = self.calibrations if method.calibrations is None else method.calibrations
        novices = self.novices if method.novices is None else method.novices
        words = ["uniform"] * (export is not None) + [f"c{calibrations}"] * (calibrations > 1) + ["novices"] * novices
        for ratio in ratios:
            for repair, bits in self._combinations(method, label=label):
                yield StageSpec(
                    name=row_name(label, words, ratio=ratio, repair=repair, bits=bits, sample=sample),
                    prune_ratio=ratio,
                    bits=bits,
                    method=method.method,
                    method_args=_seeded(method, sample=sample),
                    repair=repair,
                    label=label,
                    sample=sample,
                    calibrations=calibrations,
                    novices=novices,
                    export=export,
                )

    def _combinations(self, method: GridMethod, *, label: str) -> list[tuple[Repair, Bits]]:
        """Repairs and bits that go together: after NF4 means 4 bit, and where whole experts go nothing is refitted."""
        asked = self.repair if method.repair is None else method.repair
        repairs: Sequence[Repair] = _filled(asked, name=f"repair of {label}")
        all_bits = _filled(self.bits if method.bits is None else method.bits, name=f"bits of {label}")
        if isinstance(build_method(method.method, **method.method_args), ExpertMethod):
            repairs = [repair for repair in repairs if repair is not True] or [False]  # no expert is cut into
        if "after_nf4" in repairs and 4 not in all_bits:
            raise ValueError(f"`repair: after_nf4` of {label} needs 4 among its `bits`, got {all_bits}.")
        pairs: Iterator[tuple[Repair, Bits]] = product(repairs, all_bits)
        return [pair for pair in pairs if pair != ("after_nf4", 16)]


def needs_gradients(rows: Sequence[StageSpec]) -> bool:
    """Whether a method of these rows scores by gradients of the loss."""
    return any(row.needs_gradients for row in rows)


def _seeded(method: GridMethod, *, sample: int) -> dict[str, Any]:
    """Settings; a method with a `seed` of its own draws anew for each sample, unless a seed is given."""
    has_seed = "seed" in asdict(build_method(method.method, **method.method_args))
    return {"seed": sample} | method.method_args if has_seed else method.method_args


def _filled(values: list[T] | None, *, name: str) -> list[T]:
    if not values:
        raise ValueError(f"`{name}` of the grid is an empty list: name at least one.")
    return values


def _check_unique(rows: Sequence[StageSpec]) -> None:
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"The grid makes {twice} more than once. Give a method that stands there twice another `name`, and each "
            "ratio once."
        )
