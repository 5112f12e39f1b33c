"""What one row of a comparison asks for, what decides it, and its name."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_moe.allocation import build_method
from lightning_moe.allocation.budget import check_count, resolve_prune_ratio
from lightning_moe.allocation.methods import PruningMethod
from lightning_moe.allocation.methods.presets import MethodArgs
from lightning_moe.evaluation.stages import check_stage_name
from lightning_moe.records import ModelShape

Repair = bool | Literal["after_nf4"]
Row = dict[str, Any]

# Criteria that need the backward pass of the calibration.
GRADIENT_CRITERIA = frozenset({"snip", "taylor"})

_REPAIRED: Mapping[Repair, str] = {False: "", True: "repaired", "after_nf4": "repaired_after"}


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One row to make.

    Args:
        name: Name of the row and of its folder.
        prune_ratio: Share of routed-expert channels to remove; 0 keeps all. Exactly one of this and `keep_ratio`.
        keep_ratio: Share that stays, in (0, 1]: 1 - `prune_ratio`.
        bits: 16, or 4 for NF4.
        method: A name of `plan --method`, such as `exact_global`.
        method_args: Settings of the method.
        repair: Refit the down projections by least squares; `after_nf4` fits them against the packed rows.
        label: The method's name in tables; null: `method`.
        sample: Which sample of the calibration text decides.
        calibrations: 2 measures the cut model again half-way.
        novices: An expert that goes leaves its mean output behind.
        export: What else the row is, for tables, such as `uniform width`.

    Raises:
        ValueError: the name is not a plain file name, `bits` is neither 4 nor 16, or ratio, method or settings are
            refused.
    """

    name: str
    prune_ratio: float | None = None
    keep_ratio: float | None = None
    bits: Literal[4, 16] = 16
    method: str = "exact_global"
    method_args: MethodArgs = field(default_factory=dict)
    repair: Repair = True
    label: str | None = None
    sample: int = 0
    calibrations: int = 1
    novices: bool = False
    export: str | None = None

    def __post_init__(self) -> None:
        check_stage_name(self.name)
        resolve_prune_ratio(prune_ratio=self.prune_ratio, keep_ratio=self.keep_ratio)
        self.build()
        if self.bits not in (4, 16):
            raise ValueError(f"`bits` of stage '{self.name}' must be 4 or 16, got {self.bits}.")
        if self.repair == "after_nf4" and self.bits == 16:
            raise ValueError(f"`repair: after_nf4` of stage '{self.name}' needs `bits: 4`, got 16.")
        check_count(self.sample, name="sample", lowest=0)
        check_count(self.calibrations, name="calibrations", lowest=1)
        if self.novices and self.calibrations > 1:
            raise ValueError(f"`novices` of stage '{self.name}' go with `calibrations: 1`, got {self.calibrations}.")
        if self.calibrations > 1 and self.needs_gradients:
            raise ValueError(
                f"Stage '{self.name}' scores by gradients, which are gathered on the uncut model alone: give its "
                f"method `calibrations: 1`, got {self.calibrations}."
            )

    def build(self) -> PruningMethod:
        """The method.

        Raises:
            ValueError: it, or a setting, is refused.
        """
        return build_method(self.method, **self.method_args)

    @property
    def needs_gradients(self) -> bool:
        """Whether the method scores by gradients of the loss."""
        return bool(GRADIENT_CRITERIA & set(map(str, asdict(self.build()).values())))

    @property
    def requested_ratio(self) -> float:
        """The prune ratio, in whichever word it was given."""
        return resolve_prune_ratio(prune_ratio=self.prune_ratio, keep_ratio=self.keep_ratio)

    @property
    def reads_text(self) -> bool:
        """Whether calibration text decides anything."""
        return self.requested_ratio > 0 or self.repair == "after_nf4"

    @property
    def cut(self) -> tuple[Any, ...]:
        """What decides the cut: rows that agree on it share one model."""
        asked = (self.requested_ratio, self.repair, self.sample, self.calibrations, self.novices)
        return self.method, str(sorted(self.method_args.items())), *asked

    def resolved(self, shape: ModelShape) -> dict[str, Any]:
        """Everything that decides the cut of a model of this shape, in plain types."""
        if not self.reads_text:
            return {"ratio": 0.0, "bits": self.bits}
        method = self.build().resolved(shape)
        settings = {"preset": self.method, "settings": asdict(method), "ratio": self.requested_ratio}
        asked = ("bits", "repair", "calibrations", "novices")
        return settings | {name: getattr(self, name) for name in asked}

    def columns(self) -> Row:
        """What a row says about itself, before anything is measured."""
        return {
            "name": self.name,
            "method": self.label or (self.method if self.requested_ratio else "dense"),
            "settings": self.method_args,
            "ratio": self.requested_ratio,
            "bits": self.bits,
            "sample": self.sample,
            "calibrations": self.calibrations,
            "novices": self.novices,
            "recovered": False,
            "export": self.export,
        }


CONTROL = StageSpec(name="dense_nf4", prune_ratio=0.0, bits=4, repair=False, label="dense")  # the dense model in 4 bit


def row_name(label: str, words: Sequence[str] = (), *, ratio: float, repair: Repair, bits: int, sample: int) -> str:
    """A unique, readable name: `exact_global_50_repaired_nf4_s1`.

    Args:
        label: name of the method.
        words: what else tells rows apart.
        ratio: prune ratio.
        repair: how the row is repaired.
        bits: 16 or 4.
        sample: of the calibration text.
    """
    parts = [label, f"{100 * ratio:.6g}", *words, _REPAIRED[repair], "nf4" if bits == 4 else "", f"s{sample}"]
    return "_".join(part for part in parts if part)
