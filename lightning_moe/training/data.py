"""Lightning data module of named corpora: packed once, mixed for training, apart for validation and calibration."""

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_moe.calibration.processes import Processes
from lightning_moe.calibration.text import check_vocabulary
from lightning_moe.training.corpora import Corpus, check_corpus
from lightning_moe.training.loading import Batch, EpochShuffle, EvenShare, ReadingPosition, ResumableLoader
from lightning_moe.training.packing import Rows
from lightning_moe.training.teacher_logits import TeacherLogits
from lightning_moe.training.tokenization import corpus_rows, load_tokenizer

_LOG = logging.getLogger(__name__)

_EXAMPLE = "`speeches: {source: asset:text/speeches/recovery.jsonl}`"

Role = Literal["train", "validation", "calibration"]

# Tokens of a calibration batch where its rows are not given.
_CALIBRATION_TOKENS = 2048
# Of tokens in a row, and rows in a batch: a row is made whole, whatever the text.
_LARGEST = 2**24
_MOST_WORKERS = 1024
_SEEDS = 2**63


class TextDataModule(LightningDataModule):
    """Text, instruction or conversation corpora as rows of equal length.

    Batches are dicts of `input_ids`, `attention_mask` and `labels`, int64 [batch, tokens in a row]; labels are not
    shifted and are -100 where there is no loss (padding, prompts). Every corpus is tokenised and packed once, in
    `setup`. The reading position goes into checkpoints, so a run resumed within an epoch reads on where it stopped, on
    another number of processes too where the rows of a step (`batch_size` times processes) are as many as before.

    Several processes read disjoint rows, equally many each. N processes train on what one would with N times the
    `batch_size`, in the same order; validation counts every row once.

    Args:
        tokenizer: Folder with a tokenizer, `asset:small_moe` for the shipped one, or a hub name.
        train: Corpora to train on by name, mixed in proportion to their tokens.
        validation: Corpora to validate on, one loader each.
        calibration: Corpora to calibrate on, one loader each, always in the same order.
        sequence_length: Tokens in a training row, at least 2.
        validation_sequence_length: Tokens in a validation row, at least 2; null: `sequence_length`.
        calibration_sequence_length: Tokens in a calibration row, at least 2; null: `sequence_length`.
        batch_size: Rows in a training batch of one process.
        validation_batch_size: Rows in a validation batch; null: as in training.
        calibration_batch_size: Rows in a calibration batch; null: as in validation, but 2,048 tokens at most (or one
            row), since a layer's activations lie in memory beside it.
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
        fitting_rows = max(1, _CALIBRATION_TOKENS // self.sequence_lengths["calibration"])
        self.calibration_batch_size = _at_least(
            1,
            name="calibration_batch_size",
            value=_default(calibration_batch_size, otherwise=min(self.validation_batch_size, fitting_rows)),
        )
        self.seed = seed
        self.num_workers = _at_least(0, name="num_workers", value=num_workers)
        if self.num_workers > _MOST_WORKERS:
            raise ValueError(f"`num_workers` must be at most {_MOST_WORKERS}, got {num_workers}: each is a process.")
        if not 0 <= seed < _SEEDS:
            raise ValueError(f"`seed` of the data must be from 0 to {_SEEDS - 1}, got {seed}.")
        self.drop_last = drop_last
        self._position = ReadingPosition()
        self._restored: dict[str, int] | None = None
        self._rows: dict[tuple[Role, int], dict[str, Rows]] = {}
        self._teacher: TeacherLogits | None = None

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

    def rows(self, role: Role, *, sample: int = 0) -> Mapping[str, Rows]:
        """Packed rows by corpus of one role, made on first use.

        Args:
            role: Which corpora.
            sample: Samples of the same corpora share no token: sample s leaves out the first `s * max_tokens` of each.

        Raises:
            ValueError: See `lightning_moe.training.tokenization.corpus_rows` and `load_tokenizer`.
        """
        if (role, sample) not in self._rows:
            self._rows[role, sample] = {
                name: corpus_rows(
                    corpus,
                    sample=sample,
                    name=name,
                    tokenizer=self.tokenizer,
                    sequence_length=self.sequence_lengths[role],
                    keep_last=role != "train",
                )
                for name, corpus in self.corpora[role].items()
            }
        return self._rows[role, sample]

    def check_vocabulary(self, *, vocab_size: int) -> None:
        """Looks whether a model of this vocabulary knows every token of the rows that were made so far.

        Raises:
            ValueError: it does not: the text was tokenised for another model.
        """
        for made in self._rows.values():
            for name, rows in made.items():
                check_vocabulary(rows.input_ids_NS, corpus=name, vocab_size=vocab_size)

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """All training corpora in one loader, shuffled anew each epoch by `seed`.

        Raises:
            ValueError: There are no training corpora.
        """
        corpora = self._required("train")
        mixed = ConcatDataset([self._with_targets(rows, corpus=name) for name, rows in corpora.items()])
        processes = self._processes()
        if len(mixed) < processes.size:
            raise ValueError(
                f"`data.train` has {len(mixed)} rows of {self.sequence_lengths['train']} tokens for {processes.size} "
                "processes. Give more text, shorter rows, or fewer devices."
            )
        self._continue_reading(num_rows=len(mixed), rows_per_batch=self.batch_size * processes.size)
        return ResumableLoader(
            mixed,
            position=self._position,
            sampler=EpochShuffle(num_rows=len(mixed), seed=self.seed, processes=processes),
            batch_size=self.batch_size,
            drop_last=self.drop_last,
            **self._loader_options(),
        )

    def attach_teacher(self, logits: TeacherLogits | None) -> None:
        """Training batches bring along `teacher_ids` and `teacher_logprobs` `[B, S, k]` from now on; None: no more.

        Raises:
            ValueError: the logits are of other rows.
        """
        self._teacher = logits
        if logits is not None:
            for name, rows in self._required("train").items():
                self._with_targets(rows, corpus=name)

    def _with_targets(self, rows: Rows, *, corpus: str) -> Dataset[Batch]:
        return rows if self._teacher is None else self._teacher.of_rows(rows, corpus=corpus)

    def _processes(self) -> Processes:
        """Those of the trainer, once there is one."""
        if self.trainer is None:
            return Processes()
        return Processes(rank=self.trainer.global_rank, size=self.trainer.world_size)

    def _continue_reading(self, *, num_rows: int, rows_per_batch: int) -> None:
        """Take over the restored position, unless the data are not those that were read."""
        restored, self._restored = self._restored, None
        position = self._position
        position.num_rows, position.rows_per_batch = num_rows, rows_per_batch
        if restored is None:
            return
        if restored["num_rows"] != num_rows:
            message = "the checkpoint was reading %d training rows, these are %d: they are read from the start"
            _LOG.warning(message, restored["num_rows"], num_rows)
            return
        position.skip_epoch = restored["epoch"]
        position.skip_batches, rest = divmod(restored["num_batches"] * restored["rows_per_batch"], rows_per_batch)
        if restored["rows_per_batch"] != rows_per_batch:
            message = "the checkpoint was reading %d rows a step, these are %d: %d rows are read twice in this epoch"
            _LOG.warning(message, restored["rows_per_batch"], rows_per_batch, rest)

    @override
    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per validation corpus, in the order of `validation_names`; none where no corpora are given.

        Of several processes each gets its share of the rows (`validation_dataloaders` has all).
        """
        processes = self._processes()
        if processes.size == 1:
            return list(self.validation_dataloaders().values())
        rows = self.rows("validation").values()
        shares = [EvenShare(one, num_rows=len(one), processes=processes) for one in rows]
        size = self.validation_batch_size
        return [self._loader(share, batch_size=size, sampler=share.sampler()) for share in shares]

    def validation_dataloaders(self) -> dict[str, DataLoader[Batch]]:
        """All rows of every validation corpus, in whatever process."""
        size = self.validation_batch_size
        return {name: self._loader(rows, batch_size=size) for name, rows in self.rows("validation").items()}

    def calibration_dataloaders(self, *, sample: int = 0) -> dict[str, DataLoader[Batch]]:
        """One loader per calibration corpus, always in the same order.

        Args:
            sample: Of several samples of the same corpora, which (see `rows`).

        Raises:
            ValueError: There are no calibration corpora.
        """
        return {
            name: self._loader(rows, batch_size=self.calibration_batch_size)
            for name, rows in self._required("calibration", sample=sample).items()
        }

    def _required(self, role: Role, *, sample: int = 0) -> Mapping[str, Rows]:
        if not self.corpora[role]:
            raise ValueError(
                f"`data.{role}` names no corpora, but this command needs them. Add at least one, such as {_EXAMPLE}."
            )
        return self.rows(role, sample=sample)

    def _loader(self, rows: Dataset[Batch], *, batch_size: int, **options: Any) -> DataLoader[Batch]:
        return DataLoader(rows, batch_size=batch_size, **options, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    @override
    def state_dict(self) -> dict[str, int]:
        """Runs when a checkpoint is saved: how far the current epoch was read, the same in every process."""
        names = ("epoch", "num_batches", "rows_per_batch", "num_rows")
        return {name: vars(self._position)[name] for name in names}

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Runs on resume: what was read of the interrupted epoch is left out.

        Before the loaders are made, except under FSDP2.
        """
        self._restored = state_dict
        position = self._position
        if position.num_rows:
            self._continue_reading(num_rows=position.num_rows, rows_per_batch=position.rows_per_batch)


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
    if value > _LARGEST:
        raise ValueError(f"`{name}` must be at most {_LARGEST:,}, got {value}.")
    return value


def _default(value: int | None, *, otherwise: int) -> int:
    return otherwise if value is None else value
