"""Lightning data module of named corpora: packed once, mixed for training, apart for validation and calibration."""

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import ConcatDataset, DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_moe.training.corpora import Corpus, check_corpus
from lightning_moe.training.loading import Batch, EpochShuffle, ReadingPosition, ResumableLoader
from lightning_moe.training.packing import Rows
from lightning_moe.training.tokenization import corpus_rows, load_tokenizer

_LOG = logging.getLogger(__name__)

_EXAMPLE = "`speeches: {source: asset:text/speeches/recovery.jsonl}`"

Role = Literal["train", "validation", "calibration"]


class TextDataModule(LightningDataModule):
    """Text, instruction or conversation corpora as rows of equal length.

    Batches are dicts of `input_ids`, `attention_mask` and `labels`, int64 [batch, tokens in a row]; labels are not
    shifted and are -100 where there is no loss (padding, prompts). Every corpus is tokenised and packed once, in
    `setup`. The reading position goes into checkpoints, so a run resumed within an epoch reads on where it stopped.

    Args:
        tokenizer: Folder with a tokenizer, `asset:small_moe` for the shipped one, or a hub name.
        train: Corpora to train on by name, mixed in proportion to their tokens.
        validation: Corpora to validate on, one loader each.
        calibration: Corpora to calibrate on, one loader each, always in the same order.
        sequence_length: Tokens in a training row, at least 2.
        validation_sequence_length: Tokens in a validation row, at least 2; null: `sequence_length`.
        calibration_sequence_length: Tokens in a calibration row, at least 2; null: `sequence_length`.
        batch_size: Rows in a training batch.
        validation_batch_size: Rows in a validation batch; null: as in training.
        calibration_batch_size: Rows in a calibration batch; null: as in validation.
        seed: Seed of the training order.
        num_workers: Processes that load batches; the rows are in memory already, so 0 is right for most uses.
        drop_last: Drop the last training batch of an epoch if it is not full.

    Raises:
        ValueError: A size below its minimum, an empty dict of corpora, a wrong description, or missing files.
    """

    def __init__(
        self,
        *,
        tokenizer: str,
        train: dict[str, Corpus] | None = None,
        validation: dict[str, Corpus] | None = None,
        calibration: dict[str, Corpus] | None = None,
        sequence_length: int = 512,
        validation_sequence_length: int | None = None,
        calibration_sequence_length: int | None = None,
        batch_size: int = 8,
        validation_batch_size: int | None = None,
        calibration_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer_source = tokenizer
        self.corpora: dict[Role, dict[str, Corpus]] = {
            "train": _checked("train", corpora=train),
            "validation": _checked("validation", corpora=validation),
            "calibration": _checked("calibration", corpora=calibration),
        }
        self.sequence_lengths = _sequence_lengths(
            sequence_length, validation=validation_sequence_length, calibration=calibration_sequence_length
        )
        self.batch_size = _at_least(1, name="batch_size", value=batch_size)
        self.validation_batch_size = _at_least(
            1, name="validation_batch_size", value=_default(validation_batch_size, otherwise=batch_size)
        )
        self.calibration_batch_size = _at_least(
            1,
            name="calibration_batch_size",
            value=_default(calibration_batch_size, otherwise=self.validation_batch_size),
        )
        self.seed = seed
        self.num_workers = _at_least(0, name="num_workers", value=num_workers)
        self.drop_last = drop_last
        self._position = ReadingPosition()
        self._restored: dict[str, int] | None = None
        self._rows: dict[Role, dict[str, Rows]] = {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded once."""
        return load_tokenizer(self.tokenizer_source)

    @property
    def validation_names(self) -> tuple[str, ...]:
        """Names of the validation corpora in the order of their loaders."""
        return tuple(self.corpora["validation"])

    @property
    def calibration_names(self) -> tuple[str, ...]:
        """Names of the calibration corpora in the order of their loaders."""
        return tuple(self.corpora["calibration"])

    @override
    def setup(self, stage: str | None = None) -> None:
        """Runs at the start of every Trainer entry point: tokenises and packs what the stage reads, once."""
        roles: tuple[Role, ...] = ("train", "validation", "calibration")
        if stage in ("validate", "test", "predict"):
            roles = ("validation",)
        for role in roles:
            self.rows(role)

    def rows(self, role: Role) -> Mapping[str, Rows]:
        """Packed rows by corpus of one role, made on first use.

        Raises:
            ValueError: See `lightning_moe.training.tokenization.corpus_rows` and `load_tokenizer`.
        """
        if role not in self._rows:
            self._rows[role] = {
                name: corpus_rows(
                    corpus,
                    name=name,
                    tokenizer=self.tokenizer,
                    sequence_length=self.sequence_lengths[role],
                    keep_last=role != "train",
                )
                for name, corpus in self.corpora[role].items()
            }
        return self._rows[role]

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """All training corpora in one loader, shuffled anew each epoch by `seed`.

        Raises:
            ValueError: There are no training corpora.
        """
        mixed = ConcatDataset(list(self._required("train").values()))
        self._continue_reading(num_rows=len(mixed))
        return ResumableLoader(
            mixed,
            position=self._position,
            sampler=EpochShuffle(num_rows=len(mixed), seed=self.seed),
            batch_size=self.batch_size,
            drop_last=self.drop_last,
            **self._loader_options(),
        )

    def _continue_reading(self, *, num_rows: int) -> None:
        """Take over the restored position, unless the data are not those that were read."""
        restored, self._restored = self._restored, None
        self._position.num_rows = num_rows
        if restored is None:
            return
        if restored["num_rows"] == num_rows:
            self._position.skip_epoch = restored["epoch"]
            self._position.skip_batches = restored["num_batches"]
        else:
            message = "the checkpoint was reading %d training rows, these are %d: they are read from the start"
            _LOG.warning(message, restored["num_rows"], num_rows)

    @override
    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per validation corpus, in the order of `validation_names`; none where no corpora are given."""
        return [self._loader(rows, batch_size=self.validation_batch_size) for rows in self.rows("validation").values()]

    def calibration_dataloaders(self) -> dict[str, DataLoader[Batch]]:
        """One loader per calibration corpus, always in the same order.

        Raises:
            ValueError: There are no calibration corpora.
        """
        return {
            name: self._loader(rows, batch_size=self.calibration_batch_size)
            for name, rows in self._required("calibration").items()
        }

    def _required(self, role: Role) -> Mapping[str, Rows]:
        if not self.corpora[role]:
            raise ValueError(
                f"`data.{role}` names no corpora, but this command needs them. Add at least one, such as {_EXAMPLE}."
            )
        return self.rows(role)

    def _loader(self, rows: Rows, *, batch_size: int) -> DataLoader[Batch]:
        return DataLoader(rows, batch_size=batch_size, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    @override
    def state_dict(self) -> dict[str, int]:
        """Runs when a checkpoint is saved: how far the current epoch was read, and of how many rows."""
        position = self._position
        return {"epoch": position.epoch, "num_batches": position.num_batches, "num_rows": position.num_rows}

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Runs on resume, before the loaders are made: what was read of the interrupted epoch is left out."""
        self._restored = state_dict


def _checked(role: Role, *, corpora: dict[str, Corpus] | None) -> dict[str, Corpus]:
    if corpora is not None and not corpora:
        raise ValueError(
            f"`{role}` is an empty dict. Name at least one corpus, such as {_EXAMPLE}, or give null for none."
        )
    for name, corpus in (corpora or {}).items():
        check_corpus(corpus, name=name)
    return dict(corpora or {})


def _sequence_lengths(train: int, *, validation: int | None, calibration: int | None) -> dict[Role, int]:
    validation, calibration = _default(validation, otherwise=train), _default(calibration, otherwise=train)
    return {
        "train": _at_least(2, name="sequence_length", value=train),
        "validation": _at_least(2, name="validation_sequence_length", value=validation),
        "calibration": _at_least(2, name="calibration_sequence_length", value=calibration),
    }


def _at_least(minimum: int, *, name: str, value: int) -> int:
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
    return value


def _default(value: int | None, *, otherwise: int) -> int:
    return otherwise if value is None else value
