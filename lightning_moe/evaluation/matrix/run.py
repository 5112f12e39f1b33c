"""Makes the cells of a matrix: statistics of a text, a plan, a cut copy, its loss on every held-out corpus."""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import lightning_moe
from lightning_moe.assets import resolve_asset
from lightning_moe.evaluation.compare.bench import cut_copy
from lightning_moe.evaluation.compare.digests import Loaders, model_digest, settings_digest, text_digest
from lightning_moe.evaluation.compare.grid import needs_gradients
from lightning_moe.evaluation.compare.rows import Row, StageSpec
from lightning_moe.evaluation.matrix.prefixes import Prefixes, TextRows
from lightning_moe.evaluation.matrix.spec import ALL_EACH, Matrix
from lightning_moe.evaluation.perplexity import evaluate_model
from lightning_moe.files import read_json, write_json
from lightning_moe.models.discovery import model_shape
from lightning_moe.models.loading import DtypeName, load_model
from lightning_moe.progress import hidden
from lightning_moe.reporting.checks import check_mapping, check_number

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cut to make: a method, and the text that decides it.

    Args:
        stage: method and ratio.
        calibration: a corpus, `all` or `all_each`.
        size: tokens of the calibration, as the matrix asks for them.
        share: corpus -> rows to read.
        optional: leave the cell out where the method refuses.
    """

    stage: StageSpec
    calibration: str
    size: int
    share: Mapping[str, int]
    optional: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class MatrixRun:
    """One matrix on one model.

    Args:
        source: the dense model.
        matrix: what to make.
        rows: calibration corpora; rows of one length.
        held_out: batches to evaluate on, by corpus.
        out: cells are kept in `<out>/cells`, a JSON file each.
        batch_size: calibration rows in a batch.
        dtype: type of the weights while they are cut and evaluated.
        device: where.
        reuse: take cells that were made before from the same model, text and settings.
    """

    source: str
    matrix: Matrix
    rows: Mapping[str, TextRows]
    held_out: Loaders
    out: Path
    batch_size: int = 8
    dtype: DtypeName = "float32"
    device: torch.device | str = "cpu"
    reuse: bool = True

    def run(self) -> list[Row]:
        """All cells, the dense model first.

        Returns:
            A row per cell and held-out corpus: `method`, `settings`, `ratio`, `calibration` (None: dense), `size`
            (as asked for), `tokens` (read in all), `evaluation`, `nll` (nats per token) and `loss_above_dense`.

        Raises:
            ValueError: the sizes do not fit the text, or a method refuses statistics or ratio.
        """
        cells = self.cells()
        digests = [self._digest(cell) for cell in cells]
        todo = [cell for cell, digest in zip(cells, digests, strict=True) if self._known(digest) is None]
        log.info("%d of %d cells are reused from '%s'.", len(cells) - len(todo), len(cells), self.out / "cells")
        dense = self._known(self._digest(None)) or self._measure(self.dense, digest=self._digest(None))
        results: list[Row] = [_columns(None) | {"nll_per_corpus": dense}]
        made: set[str] = set()
        with tqdm(total=len(todo), unit=" cells", disable=hidden(progress=True)) as bar:
            for cell, digest in zip(cells, digests, strict=True):
                known = self._known(digest, this_run=digest in made)
                if known is None:
                    bar.set_description(f"{cell.stage.name} on {cell.calibration}")
                    known = self._make(cell, digest=digest)
                    made.add(digest)
                    bar.update()
                if known is not None:
                    tokens = self._row_length * sum(cell.share.values())
                    results.append(_columns(cell) | {"tokens": tokens, "nll_per_corpus": known})
        return list(_per_corpus(results))

    def cells(self) -> list[Cell]:
        """What is to be cut, in the order of the table."""
        shares = self.matrix.shares(list(self.rows), row_length=self._row_length)
        everything = ALL_EACH if len(self.rows) > 1 else next(iter(self.rows))
        cells = [
            Cell(stage=stage, calibration=calibration, size=size, share=share)
            for stage in self.matrix.stages()
            for (calibration, size), share in shares.items()
        ]
        cells += [
            Cell(stage=stage, calibration=everything, size=size, share=share, optional=True)
            for stage in self.matrix.variant_stages()
            for (calibration, size), share in shares.items()
            if calibration == everything
        ]
        return cells

    def _make(self, cell: Cell, *, digest: str) -> dict[str, float] | None:
        """Cuts and measures a cell; None where it is left out."""
        statistics = self.prefixes.statistics(self.dense, share=cell.share, gradients=self._gradients)
        try:
            plan = cell.stage.build().plan(statistics, prune_ratio=cell.stage.requested_ratio)
        except ValueError as error:
            if not cell.optional:
                raise
            log.warning("%s on %d tokens is left out: %s", cell.stage.name, cell.size, error)
            return None
        return self._measure(cut_copy(self.dense, plan=plan).model, digest=digest)

    def _measure(self, model: PreTrainedModel, *, digest: str) -> dict[str, float]:
        result = evaluate_model(model, loaders=self.held_out, progress=False)
        nll = dict(result.nll_per_corpus)
        write_json(self._file(digest), {"nll_per_corpus": nll})
        return nll

    def _known(self, digest: str, *, this_run: bool = False) -> dict[str, float] | None:
        file = self._file(digest)
        if not (self.reuse or this_run) or not file.is_file():
            return None
        return _losses(read_json(file, what="cell of a matrix"), file=file, corpora=self.held_out)

    def _file(self, digest: str) -> Path:
        return self.out / "cells" / f"{digest}.json"

    def _digest(self, cell: Cell | None) -> str:
        """Of everything that decides a cell's numbers; None is the dense model."""
        decides: dict[str, Any] = {"version": lightning_moe.__version__, "dtype": self.dtype} | self._fixed
        if cell is None:
            return settings_digest(decides)
        settings = cell.stage.resolved(model_shape(self.dense))
        return settings_digest(decides | {"cut": settings, "calibration": self._text_digest(cell.share)})

    def _text_digest(self, share: Mapping[str, int]) -> list[str]:
        return [self._digests[corpus, count] for corpus, count in share.items()]

    @cached_property
    def _digests(self) -> dict[tuple[str, int], str]:
        """Of the text of every prefix; its corpus's name counts."""
        return {
            (corpus, count): text_digest({corpus: self.prefixes.batches(corpus, stop=count)})
            for corpus, counts in self.prefixes.counts.items()
            for count in counts
        }

    @cached_property
    def _fixed(self) -> dict[str, str]:
        return {"model": model_digest(resolve_asset(self.source)), "held_out": text_digest(self.held_out)}

    @cached_property
    def prefixes(self) -> Prefixes:
        """Text and statistics of the calibrations."""
        shares = self.matrix.shares(list(self.rows), row_length=self._row_length).values()
        return Prefixes(self.rows, shares=shares, batch_size=self.batch_size)

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The dense model, loaded once."""
        model = load_model(self.source, dtype=self.dtype)
        return model.to(self.device)  # pyright: ignore[reportArgumentType]: `to` is wrapped without its types

    @property
    def _row_length(self) -> int:
        return len(next(iter(self.rows.values()))[0]["input_ids"])

    @property
    def _gradients(self) -> bool:
        stages = [*self.matrix.stages(), *self.matrix.variant_stages()]
        return needs_gradients([replace(stage, name="any") for stage in stages])


def _losses(content: object, *, file: Path, corpora: Collection[str]) -> dict[str, float]:
    """What a cell's file holds: the loss of every held-out corpus."""
    where = f"'nll_per_corpus' of '{file}'"
    losses = check_mapping(check_mapping(content, where=f"'{file}'").get("nll_per_corpus"), where=where)
    if set(losses) != set(corpora):
        raise ValueError(f"{where} must name the corpora {sorted(corpora)}, got {sorted(losses)}. Delete the file.")
    return {corpus: check_number(losses, key=corpus, where=where) for corpus in losses}


def _columns(cell: Cell | None) -> Row:
    """What a row says about itself."""
    if cell is None:
        return {"method": "dense", "settings": {}, "ratio": 0.0, "calibration": None, "size": 0, "tokens": 0}
    stage = cell.stage
    return {
        "method": stage.name,
        "settings": stage.method_args,
        "ratio": stage.requested_ratio,
        "calibration": cell.calibration,
        "size": cell.size,
        "variant": cell.optional,
    }


def _per_corpus(results: list[Row]) -> Iterator[Row]:
    """A row per held-out corpus; the first result is the dense model's."""
    dense = results[0]["nll_per_corpus"]
    for result in results:
        own = {name: value for name, value in result.items() if name != "nll_per_corpus"}
        for corpus, nll in result["nll_per_corpus"].items():
            yield own | {"evaluation": corpus, "nll": nll, "loss_above_dense": nll - dense[corpus]}
