"""Runs the rows of a comparison: cuts are shared, rows written as they are made, and reused if nothing changed."""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

import lightning_moe
from lightning_moe.assets import resolve_asset
from lightning_moe.evaluation.agreement import DenseReference
from lightning_moe.evaluation.compare.bench import CutModel, Measures, cut_copy, staged_copy
from lightning_moe.evaluation.compare.book import RowBook
from lightning_moe.evaluation.compare.calibrations import SampleCalibration
from lightning_moe.evaluation.compare.digests import Loaders, model_digest, settings_digest
from lightning_moe.evaluation.compare.rows import Row, StageSpec
from lightning_moe.models.discovery import model_shape
from lightning_moe.models.loading import load_model, read_config
from lightning_moe.progress import hidden
from lightning_moe.records import CalibrationStatistics, ModelShape, PrunePlan
from lightning_moe.surgery.novices import mean_outputs

log = logging.getLogger(__name__)

_TimedPlan = tuple[PrunePlan, float]
DENSE = StageSpec(name="dense", prune_ratio=0.0, repair=False, label="dense")


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What the rows of one comparison share.

    Args:
        source: the dense model.
        calibration: batches of a sample of the calibration text, by corpus.
        measures: held-out text and whatever else is measured of every row.
        out: rows go to `<out>/stages`, models to `<out>/models`, statistics to `<out>/statistics_<sample>.safetensors`.
        statistics: of sample 0, if they exist already; else they are gathered.
        agreement: also measure KL and top-1 agreement with the dense model.
        gradients: gather the sums that need gradients of the loss, too.
        keep: names of the rows whose models stay on disk.
        reuse: take rows that were made before from the same things.
    """

    source: str
    calibration: Callable[[int], Loaders]
    measures: Measures
    out: Path
    statistics: CalibrationStatistics | None = None
    agreement: bool = False
    gradients: bool = False
    keep: Collection[str] = ()
    reuse: bool = True
    made: dict[str, Row] = field(default_factory=dict, init=False)
    """Rows of the last `run` by name, as far as it came, in the order in which they were made."""

    def run(self, specs: Sequence[StageSpec]) -> list[Row]:
        """Makes the dense row and all others, in their order.

        Raises:
            ValueError: two rows share a name, the model is packed, `out` holds rows of another model, the statistics
                are of another, or something of a row is refused.
        """
        check_names(specs)
        self._check_width()
        if self.statistics is not None and self.statistics.shape != self._shape:
            raise ValueError(
                f"The statistics were gathered on another model than '{self.source}' (or in another type than "
                f"{self.measures.dtype}). Calibrate this one, or leave `statistics` out."
            )
        specs = [DENSE, *specs]
        self.made.clear()
        self.made.update({spec.name: row for spec in specs if (row := self._known(spec)) is not None})
        log.info("%d of %d rows are reused from '%s'.", len(self.made), len(specs), self.out / "stages")
        todo = [spec for spec in specs if spec.name not in self.made]
        with tqdm(total=len(todo), unit=" rows", disable=hidden(progress=True)) as bar:
            for row in self._make_all(todo, bar=bar):
                self.made[row["name"]] = row
                bar.update()
        _remove_if_empty(self.out / "models")
        return [self.made[spec.name] for spec in specs]

    def _check_width(self) -> None:
        packing = read_config(self._location).to_dict().get("quantization_config", {})
        if packing.get("packed_experts") or packing.get("packed_linears"):
            raise ValueError(
                f"'{self.source}' is packed in NF4, and the rows are compared with a dense model in 16 bit. Name the "
                "model that it was made from; `bits: [16, 4]` packs it here."
            )

    def _make_all(self, specs: Sequence[StageSpec], *, bar: Any) -> Iterator[Row]:
        """Rows of one cut follow each other, 16 bit first; cuts of one sample do, too, after all its plans."""
        for sample, own in groupby(sorted(specs, key=attrgetter("sample")), key=attrgetter("sample")):
            cuts: dict[tuple[Any, ...], list[StageSpec]] = {}
            for spec in own:
                cuts.setdefault(spec.cut, []).append(spec)
            bar.set_description(f"plans of sample {sample}")
            plans = {key: self._plan(members[-1]) for key, members in cuts.items() if members != [DENSE]}
            for key, members in cuts.items():
                yield from self._make_cut(members, plan=plans.get(key), bar=bar)

    def _make_cut(self, members: Sequence[StageSpec], *, plan: _TimedPlan | None, bar: Any) -> Iterator[Row]:
        """Rows of one cut; no plan: of none."""
        cut: CutModel | None = None
        members = sorted(members, key=lambda spec: -spec.bits)
        for spec in members:
            bar.set_description(spec.name)
            row = self._known(spec)  # another name of a row that was made a moment ago
            if row is None and spec is not DENSE and plan is not None:
                cut = cut or self._cut(spec, plan=plan)
            yield row or self._make(spec, cut=cut, last=spec is members[-1])

    def _make(self, spec: StageSpec, *, cut: CutModel | None, last: bool) -> Row:
        """Measures a cut model (None: the dense one, as it is stored) and writes the row."""
        if cut is None:
            measured = self.measuring.of_folder(spec.name, folder=self._location, prune_ratio=0.0, seconds=0.0)
            measured |= {"repair": False, "bits": spec.bits}
        else:
            folder, keep = self.model_folder(spec.name), spec.name in self.keep
            settings = {"bits": spec.bits, "folder": folder, "measures": self.measuring, "keep": keep, "last": last}
            measured = cut.measure(spec.name, **settings)
        return self.book.add(spec.columns(), measured, digest=self._digest(spec))

    def _known(self, spec: StageSpec) -> Row | None:
        """A row made before from the same things, under this row's name; its model too, where it is to stay."""
        kept = spec is DENSE or spec.name not in self.keep or self.model_folder(spec.name).is_dir()
        return self.book.find(spec.columns(), digest=self._digest(spec)) if self.reuse and kept else None

    def _digest(self, spec: StageSpec) -> str:
        """Of everything that decides a row but its name."""
        decides = {"version": lightning_moe.__version__, "model": self.book.model, "agreement": self.agreement}
        decides |= self.measures.settings
        if spec is DENSE:
            return settings_digest(decides)
        text = self._samples[spec.sample].digest if spec.reads_text else None
        return settings_digest(decides | {"row": spec.resolved(self._shape), "calibration": text})

    def _plan(self, spec: StageSpec) -> _TimedPlan:
        """The plan of a row's only cut, or of its first: so that one that cannot be had is refused before any cut."""
        statistics, started = self._samples[spec.sample].statistics, time.perf_counter()
        plan = spec.build().plan(statistics, prune_ratio=spec.requested_ratio / spec.calibrations)
        return plan, time.perf_counter() - started

    def _cut(self, spec: StageSpec, *, plan: _TimedPlan) -> CutModel:
        sample = self._samples[spec.sample]
        for other in self._samples.values():
            if other is not sample:
                other.forget_grams()
        cut = self._staged(spec, sample) if spec.calibrations > 1 else self._at_once(spec, sample, *plan)
        if spec.sample == 0 and spec.requested_ratio:  # plans of other samples differ in little
            cut.plan.save(self.out / "plans" / f"{spec.name}.json")
        return cut

    def _staged(self, spec: StageSpec, sample: SampleCalibration) -> CutModel:
        return staged_copy(
            self.dense,
            method=spec.build(),
            prune_ratio=spec.requested_ratio,
            statistics=sample.statistics,
            calibration=sample.loaders,
            stages=spec.calibrations,
            repair=spec.repair,
        )

    def _at_once(self, spec: StageSpec, sample: SampleCalibration, plan: PrunePlan, seconds: float) -> CutModel:
        started = time.perf_counter()
        novices = mean_outputs(sample.statistics, plan=plan) if spec.novices else None
        seconds += time.perf_counter() - started
        grams, gram_seconds = (sample.grams if spec.repair is True else None) or (None, 0.0)
        loaders = sample.loaders
        cut = cut_copy(self.dense, plan=plan, repair=spec.repair, calibration=loaders, grams=grams, novices=novices)
        return replace(cut, seconds=cut.seconds + seconds + gram_seconds)

    @cached_property
    def measuring(self) -> Measures:
        """With the dense model's predictions, which are made when the first row is."""
        if not self.agreement:
            return self.measures
        reference = DenseReference.measure(self.dense, loaders=self.measures.held_out)
        return replace(self.measures, reference=reference)

    def model_folder(self, name: str) -> Path:
        """Where the model of a row lies while it is evaluated, and stays if it is kept."""
        return self.out / "models" / name

    @property
    def _location(self) -> str:
        return resolve_asset(self.source)

    @cached_property
    def _samples(self) -> dict[int, SampleCalibration]:
        return _Samples(self)

    @cached_property
    def _shape(self) -> ModelShape:
        return model_shape(self.dense)

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The dense model, loaded once."""
        model = load_model(self.source, dtype=self.measures.dtype)
        return model.to(self.measures.device)  # pyright: ignore[reportArgumentType]: `to` is wrapped without its types

    @cached_property
    def book(self) -> RowBook:
        """Rows made before."""
        return RowBook(self.out, model=model_digest(self._location))


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


class _Samples(dict[int, SampleCalibration]):
    """Samples by number, made when they are asked for."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__()
        self.comparison = comparison

    def __missing__(self, sample: int) -> SampleCalibration:
        own = self.comparison
        origin = {"model": own.book.model, "dtype": own.measures.dtype, "version": lightning_moe.__version__}
        self[sample] = SampleCalibration(
            model=own.dense,
            loaders=own.calibration(sample),
            file=own.out / f"statistics_{sample}.safetensors",
            origin=origin,
            gradients=own.gradients,
            given=own.statistics if sample == 0 else None,
        )
        return self[sample]


def check_names(specs: Sequence[StageSpec]) -> None:
    """Every row needs its own name.

    Raises:
        ValueError: a name comes twice, or is the dense row's.
    """
    names = [DENSE.name, *(spec.name for spec in specs)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Every stage needs its own name, and `dense` is the unpruned model's; {twice} come more than once. "
            "Give another `name`."
        )
