"""What `compare.json` says, checked once and typed: rows, and what is the same but for the calibration sample."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from lightning_moe.reporting.checks import check_count, check_known, check_mapping, check_number, check_text

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a row was made, the calibration sample left out.

    Args:
        method: Preset, or `dense`.
        ratio: Prune ratio that was asked for, in [0, 1); None where a budget was asked for.
        bits: 16, or 4 for NF4.
        repair: Down projections were refitted by least squares.
        recovered: Trained for a while after the cut.
        variant: What else tells rows of one method apart (a budget, an export format, other settings of the method).
    """

    method: str
    ratio: float | None
    bits: int
    repair: bool
    recovered: bool = False
    variant: str = ""

    @property
    def line(self) -> Self:
        """The same setting at any ratio: what one line in a figure joins."""
        return replace(self, ratio=None)

    @property
    def label(self) -> str:
        """What a table calls it.

        Examples:
            >>> Setting(method="exact_global", ratio=0.5, bits=4, repair=True).label
            'exact_global 0.50 NF4, repaired'
        """
        words = [self.method, *([] if self.ratio is None else [f"{self.ratio:.2f}"]), self.variant]
        words += [] if self.bits == 16 else ["NF4" if self.bits == 4 else f"{self.bits} bit"]
        return ", ".join(
            [" ".join(word for word in words if word)] + ["repaired"] * self.repair + ["recovered"] * self.recovered
        )


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Accuracy on one task and its standard error, shares of 1."""

    accuracy: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluated model; losses in nats per token, what was not measured is None.

    Args:
        name: Of the row.
        setting: How it was made.
        sample: Which calibration sample.
        settings: Of the method, without a seed, as JSON.
        nll: Mean loss over the corpora; NaN or infinite where the model broke.
        nll_per_corpus: Loss per corpus.
        stored_params: Parameters in the file.
        active_params: Parameters that one token uses, as measured.
        bytes: On disk.
        seconds: That making it took.
        kl: KL divergence from the dense model, nats per token.
        top1_agreement: Share of tokens whose most likely successor is the dense model's.
        prune_ratio: Share of the routed-expert channels that really went.
        tasks: Accuracies by task.
    """

    name: str
    setting: Setting
    sample: int
    settings: str
    nll: float
    nll_per_corpus: Mapping[str, float]
    stored_params: int | None
    active_params: int | None
    bytes: int | None
    seconds: float | None
    kl: float | None
    top1_agreement: float | None
    prune_ratio: float | None
    tasks: Mapping[str, TaskScore]

    @classmethod
    def from_dict(cls, content: object, *, index: int) -> Self:
        """One entry of `compare.json`.

        Raises:
            ValueError: something is missing or has the wrong kind; the message names the row.
        """
        row = check_mapping(content, where=f"Row {index} of the comparison")
        where = f"row {index} of the comparison"
        method = check_text(row, key="method", where=where.capitalize())
        name = str(row.get("name") or method)
        corpora = check_mapping(row.get("nll_per_corpus") or {}, where=f"'nll_per_corpus' of {where}")
        tasks = check_mapping(row.get("tasks") or {}, where=f"'tasks' of {where}")
        return cls(
            name=name,
            setting=_setting(row, method=method, where=where),
            sample=check_count(row, key="sample", where=where) or 0,
            settings=_method_settings(row, where=where),
            nll=check_number(row, key="nll", where=where),
            nll_per_corpus={str(key): check_number(corpora, key=key, where=where) for key in corpora},
            tasks={
                str(key): _task_score(task, where=f"{str(key)!r} of 'tasks' of {where}") for key, task in tasks.items()
            },
            stored_params=check_count(row, key="stored_params", where=where),
            active_params=check_count(row, key="active_params", where=where),
            bytes=check_count(row, key="bytes", where=where),
            seconds=check_known(row, key="seconds", where=where),
            kl=check_known(row, key="kl", where=where),
            top1_agreement=check_known(row, key="top1_agreement", where=where),
            prune_ratio=check_known(row, key="prune_ratio", where=where),
        )


def _setting(row: Mapping[str, Any], *, method: str, where: str) -> Setting:
    ratio = check_known(row, key="ratio", where=where)
    if ratio is not None and ratio >= 1:
        raise ValueError(f"'ratio' of {where} must be in [0, 1), got {ratio}.")
    bits = check_count(row, key="bits", where=where)
    return Setting(
        method=method,
        ratio=ratio,
        bits=16 if bits is None else bits,
        repair=bool(row.get("repair")),
        recovered=bool(row.get("recovered")),
        variant=_variant(row),
    )


def _variant(row: Mapping[str, Any]) -> str:
    """What else was asked of the row, in words."""
    words = [str(row[key]) for key in ("budget", "export") if row.get(key)]
    words += ["fitted after NF4"] if row.get("repair") == "after_nf4" else []
    words += [f"{row['calibrations']} calibrations"] if row.get("calibrations") not in (None, 1) else []
    words += ["with mean outputs"] if row.get("novices") else []
    return " ".join(words)


def _method_settings(row: Mapping[str, Any], *, where: str) -> str:
    """A seed is another one for each sample, and tells nothing."""
    settings = check_mapping(row.get("settings") or {}, where=f"'settings' of {where}")
    return json.dumps({key: value for key, value in settings.items() if key != "seed"}, sort_keys=True)


def _own_setting(row: Row, *, grouped: Mapping[Setting, Sequence[Row]]) -> Setting:
    """The row's setting; with its name where one of that setting, but of that sample or other settings, came before."""
    before = grouped.get(row.setting, ())
    taken = any(other.sample == row.sample or other.settings != row.settings for other in before)
    return replace(row.setting, variant=row.name) if taken else row.setting


def _task_score(content: object, *, where: str) -> TaskScore:
    task = check_mapping(content, where=where)
    return TaskScore(
        accuracy=check_number(task, key="acc", where=where), stderr=check_known(task, key="stderr", where=where)
    )


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean, lowest and highest of a number over calibration samples."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least one number."""
        return cls(mean=math.fsum(values) / len(values), low=min(values), high=max(values))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Rows that differ in nothing but the calibration sample."""

    setting: Setting
    rows: tuple[Row, ...]

    def spread(self, value: Callable[[Row], float | None]) -> Spread | None:
        """Of a number that every row has; None where one lacks it or it is not finite."""
        values = [value(row) for row in self.rows]
        known = [number for number in values if number is not None and math.isfinite(number)]
        return Spread.of(known) if known and len(known) == len(values) else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows of one comparison.

    Args:
        dense: The unpruned model in 16 bit, to which all others are compared.
        variants: Everything else, in the order of the file.
        num_samples: Calibration samples of the variant that has most.
    """

    dense: Row
    variants: tuple[Variant, ...]
    num_samples: int = field(default=1)

    @classmethod
    def from_rows(cls, rows: object) -> Self:
        """Reads the list in `compare.json`.

        Raises:
            ValueError: no list, no dense row, or a broken row; the message names the place.
        """
        if not isinstance(rows, list | tuple):
            raise ValueError(f"A comparison must be a list of rows, got {type(rows).__name__}.")
        checked = [Row.from_dict(row, index=index) for index, row in enumerate(rows)]
        dense = next(
            (row for row in checked if row.setting == Setting(method=DENSE, ratio=0.0, bits=16, repair=False)), None
        )
        if dense is None:
            methods = sorted({row.setting.method for row in checked})
            raise ValueError(
                f"A comparison needs the row of the unpruned model (method `{DENSE}`, ratio 0, 16 bit), got the "
                f"methods {methods}. Run `compare` again; it adds the row."
            )
        grouped: dict[Setting, list[Row]] = {}
        for row in checked:
            if row.setting != dense.setting:
                grouped.setdefault(_own_setting(row, grouped=grouped), []).append(row)
        variants = tuple(Variant(setting=setting, rows=tuple(own)) for setting, own in grouped.items())
        num_samples = max((len(variant.rows) for variant in variants), default=1)
        return cls(dense=dense, variants=variants, num_samples=num_samples)

    def loss(self, variant: Variant) -> Spread | None:
        """Loss above dense, nats per token; None where a sample broke the model."""
        return variant.spread(lambda row: row.nll - self.dense.nll)

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods without the dense model, in the order of the file."""
        names = dict.fromkeys(variant.setting.method for variant in self.variants)
        return tuple(name for name in names if name != DENSE)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that the dense model and at least one other row were asked."""
        asked = {task for variant in self.variants for row in variant.rows for task in row.tasks}
        return tuple(task for task in self.dense.tasks if task in asked)

    def lines(self) -> dict[Setting, list[Variant]]:
        """Variants that differ in the ratio only, by what they share; smallest ratio first."""
        joined: dict[Setting, list[Variant]] = {}
        for variant in sorted(self.variants, key=lambda own: own.setting.ratio or 0.0):
            if variant.setting.method != DENSE:
                joined.setdefault(variant.setting.line, []).append(variant)
        return joined
