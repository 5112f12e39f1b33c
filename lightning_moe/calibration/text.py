"""The text of a calibration: batches by corpus, read under a progress bar, or kept for several passes.

B sequences, S tokens of one.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.progress import hidden

Batch = Mapping[str, Any]


class TextReader:
    """Corpus and decoder inputs of every batch of this process, corpus by corpus, under a progress bar.

    Args:
        loaders: corpus name -> batches.
        device: where the batches go.
        progress: show a progress bar.
        processes: those that share the batches.
        title: what stands before the progress bar.
        vocab_size: rows of the model's embeddings; token ids are below it.

    Raises:
        ValueError: no corpus.
    """

    def __init__(
        self,
        loaders: Mapping[str, Iterable[Batch]],
        *,
        device: torch.device | str,
        progress: bool,
        processes: Processes = ALONE,
        title: str = "Calibrating",
        vocab_size: int | None = None,
    ) -> None:
        if not loaders:
            raise ValueError("Calibration needs at least one corpus, got none. Name one in `data.calibration`.")
        self.loaders = loaders
        self.vocab_size = vocab_size
        self.device = device
        self.processes = processes
        self._bar = {"disable": hidden(progress=progress and processes.rank == 0), "leave": False}
        self._title = title
        self._counts = torch.zeros(len(loaders), 2, dtype=torch.int64)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Counts as it reads.

        Raises:
            ValueError: a batch that cannot be run (see `check_batch`).
        """
        self._counts.zero_()
        for index, (corpus, loader) in enumerate(self.loaders.items()):
            for batch in tqdm(self.processes.share(loader), desc=f"{self._title}: {corpus}", **self._bar):
                check_batch(batch, corpus=corpus, vocab_size=self.vocab_size)
                inputs = {
                    name: batch[name].to(self.device) for name in ("input_ids", "attention_mask") if name in batch
                }
                mask = inputs.get("attention_mask")
                num_tokens = inputs["input_ids"].numel() if mask is None else int(mask.count_nonzero())
                self._counts[index] += torch.tensor([1, num_tokens])
                yield corpus, inputs

    def check_not_empty(self) -> int:
        """After reading: the tokens that count, of all processes together.

        Raises:
            ValueError: a corpus had no batch, or all its tokens are padding.
        """
        self.processes.sum_(self._counts)
        for corpus, (num_batches, num_tokens) in zip(self.loaders, self._counts.tolist(), strict=True):
            if num_tokens == 0:
                what = "only padding" if num_batches else "no batch"
                raise ValueError(f"Corpus '{corpus}' has {what}. Give it text, or leave it out.")
        return int(self._counts[:, 1].sum())

    @property
    def num_tokens(self) -> dict[str, int]:
        """After `check_not_empty`: the tokens of each corpus that count."""
        return dict(zip(self.loaders, self._counts[:, 1].tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """This process's batches, on the CPU: 16 bytes a token.

    Args:
        batches: corpus and inputs (`input_ids`, and `attention_mask` where there is padding) of each, `[B, S]`.
        num_tokens: tokens of each corpus that count, of all processes together.
        num_positions: tokens of all processes together, padding included.
        digest: SHA-256 over the batches of all processes: tells one text from another.
    """

    batches: tuple[tuple[str, dict[str, Tensor]], ...]
    num_tokens: Mapping[str, int]
    num_positions: int
    digest: str

    @classmethod
    def read(
        cls, loaders: Mapping[str, Iterable[Batch]], *, processes: Processes = ALONE, vocab_size: int | None = None
    ) -> Self:
        """Reads every loader once; token ids must be below `vocab_size`, where it is given.

        Raises:
            ValueError: no corpus, an empty loader, a corpus of padding only, or a batch that cannot be run.
        """
        reader = TextReader(loaders, device="cpu", progress=False, processes=processes, vocab_size=vocab_size)
        with processes.together():
            batches = tuple(reader)
        reader.check_not_empty()
        digests, positions = zip(*processes.gather((_digest(batches), _num_positions(batches))), strict=True)
        return cls(
            batches=batches,
            num_tokens=reader.num_tokens,
            num_positions=sum(positions),
            digest=hashlib.sha256("|".join(digests).encode()).hexdigest(),
        )


def vocab_size(model: PreTrainedModel) -> int:
    """Tokens that a model knows: ids are below it."""
    return int(model.config.get_text_config().vocab_size)


def check_batch(batch: Any, *, corpus: str, vocab_size: int | None = None) -> None:
    """Refuses a batch that a model could not run, or would answer with an error of its own.

    Args:
        batch: what a loader gave.
        corpus: its name.
        vocab_size: rows of the model's embeddings.

    Raises:
        ValueError: no `input_ids` of whole numbers `[B, S]`, none at all, a mask of another shape, or a token that the
            model does not know.
    """
    ids_BS = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids_BS, Tensor) or ids_BS.dim() != 2 or ids_BS.is_floating_point():
        got = f"{tuple(ids_BS.shape)} of {ids_BS.dtype}" if isinstance(ids_BS, Tensor) else _kind(batch)
        raise ValueError(f"Corpus '{corpus}': a batch must have `input_ids`, whole numbers [B, S], got {got}.")
    if not ids_BS.numel():
        raise ValueError(f"Corpus '{corpus}': a batch of shape {tuple(ids_BS.shape)} has no token. Leave it out.")
    mask_BS = batch.get("attention_mask")
    if mask_BS is not None and mask_BS.shape != ids_BS.shape:
        raise ValueError(
            f"Corpus '{corpus}': `attention_mask` {tuple(mask_BS.shape)} must have the shape of `input_ids`, "
            f"{tuple(ids_BS.shape)}, with 0 for padding."
        )
    if vocab_size is not None:
        check_vocabulary(ids_BS, corpus=corpus, vocab_size=vocab_size)


def check_vocabulary(ids_BS: Tensor, *, corpus: str, vocab_size: int) -> None:
    """Refuses tokens that a model of this vocabulary has no embedding for.

    Raises:
        ValueError: with the token and the size of the vocabulary.
    """
    lowest, highest = map(int, torch.aminmax(ids_BS))
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"Corpus '{corpus}' has token {lowest if lowest < 0 else highest}, and the model knows 0 to "
            f"{vocab_size - 1}. Tokenise with the model's own tokenizer (`data.tokenizer`)."
        )


def _kind(batch: Any) -> str:
    return f"{sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"


def _num_positions(batches: Iterable[tuple[str, Mapping[str, Tensor]]]) -> int:
    return sum(inputs["input_ids"].numel() for _, inputs in batches)


def _digest(batches: Iterable[tuple[str, Mapping[str, Tensor]]]) -> str:
    digest = hashlib.sha256()
    for corpus, inputs in batches:
        for name, value_BS in inputs.items():
            digest.update(f"{corpus}|{name}|{tuple(value_BS.shape)}|".encode())
            digest.update(value_BS.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
