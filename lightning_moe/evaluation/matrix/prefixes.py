"""Statistics of the beginnings of corpora: every row of text runs once, longer beginnings add to shorter ones."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.gradients import collect_gradients
from lightning_moe.records import CalibrationStatistics


class TextRows(Protocol):
    """Rows of one corpus in their order, each with `input_ids`, `attention_mask` and `labels`, int64 [S]."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Tensor]: ...


class Prefixes:
    """Batches and statistics of the first rows of each corpus.

    Args:
        rows: corpus -> its rows.
        shares: every share that will be asked for: corpus -> number of rows.
        batch_size: rows in a batch.

    Raises:
        ValueError: a corpus has fewer whole rows than a share takes.
    """

    def __init__(self, rows: Mapping[str, TextRows], *, shares: Iterable[Mapping[str, int]], batch_size: int) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.counts: dict[str, set[int]] = {corpus: set() for corpus in rows}
        for share in shares:
            for corpus, count in share.items():
                self.counts[corpus].add(count)
        for corpus, counts in self.counts.items():
            _check_whole(rows[corpus], corpus=corpus, wanted=max(counts))
        self._sums: dict[tuple[str, int], CalibrationStatistics] = {}

    def batches(self, corpus: str, *, start: int = 0, stop: int) -> list[dict[str, Tensor]]:
        """Rows `start` to `stop` of a corpus, [B, S] each."""
        parts = [range(at, min(at + self.batch_size, stop)) for at in range(start, stop, self.batch_size)]
        return [_stacked([self.rows[corpus][index] for index in part]) for part in parts]

    def loaders(self, share: Mapping[str, int]) -> dict[str, list[dict[str, Tensor]]]:
        """The text of a share, by corpus."""
        return {corpus: self.batches(corpus, stop=count) for corpus, count in share.items()}

    def statistics(self, model: PreTrainedModel, *, share: Mapping[str, int], gradients: bool) -> CalibrationStatistics:
        """Of a share, its corpora apart. What was gathered for another share is used again.

        Args:
            model: the dense model.
            share: corpus -> number of rows, one of those given at the start.
            gradients: also gather the sums that need gradients of the loss.
        """
        parts = [
            self._prefix(model, corpus=corpus, count=count, gradients=gradients) for corpus, count in share.items()
        ]
        corpora = {corpus: layers for part in parts for corpus, layers in part.corpora.items()}
        return CalibrationStatistics(shape=parts[0].shape, corpora=corpora, weights=parts[0].weights)

    def _prefix(self, model: PreTrainedModel, *, corpus: str, count: int, gradients: bool) -> CalibrationStatistics:
        if (corpus, count) not in self._sums:
            before = max((other for other in self.counts[corpus] if other < count), default=0)
            loaders = {corpus: self.batches(corpus, start=before, stop=count)}
            own = collect_statistics(model, loaders=loaders)
            if gradients:
                own = own.with_sums(collect_gradients(model, loaders=loaders))
            if before:
                own = self._prefix(model, corpus=corpus, count=before, gradients=gradients).merge(own)
            self._sums[corpus, count] = own
        return self._sums[corpus, count]


def _stacked(rows: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _check_whole(rows: TextRows, *, corpus: str, wanted: int) -> None:
    whole = sum(bool(rows[index]["attention_mask"].all()) for index in range(min(wanted, len(rows))))
    if whole < wanted:
        raise ValueError(
            f"Calibration corpus '{corpus}' has {whole} whole rows, and the largest size of the matrix reads {wanted}. "
            "Lower `tokens`, raise the corpus's `max_tokens`, or give more text."
        )
