"""A teacher's k likeliest next tokens for every training row, on disk: the teacher need not fit beside the student.

A folder holds `manifest.json` and shards of rows. A shard is named after the digest of its corpus's rows, so that
logits of other rows cannot be taken for these, whatever a corpus is called.

N rows, S positions, k tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_moe.files import LazyTensors, digest_of_tensors, open_tensors, read_json
from lightning_moe.training.batches import TEACHER_IDS, TEACHER_LOGPROBS
from lightning_moe.training.packing import Rows

LogProbDtype = Literal["float16", "float32"]

_LARGEST_INT16 = 2**15


@dataclass(frozen=True, kw_only=True)
class TeacherManifest:
    """What a folder of teacher logits holds.

    Args:
        teacher: the model they come from, as it was named.
        quantize: `nf4` or `none`: how it was loaded.
        k: tokens per position.
        vocab_size: of the teacher.
        sequence_length: tokens in a row.
        log_prob_dtype: stored type of the log-probabilities.
        shard_rows: rows in a shard; the last one of a corpus may have fewer.
        corpora: name -> digest of its rows.
        num_rows: name -> number of its rows.
    """

    teacher: str
    quantize: str
    k: int
    vocab_size: int
    sequence_length: int
    log_prob_dtype: LogProbDtype
    shard_rows: int
    corpora: Mapping[str, str]
    num_rows: Mapping[str, int]

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads `manifest.json`.

        Raises:
            ValueError: it is missing, or not a manifest.
        """
        content = read_json(Path(folder) / "manifest.json", what="manifest of teacher logits")
        types: dict[str, Any] = {"corpora": dict, "num_rows": dict, "teacher": str, "quantize": str}
        types["log_prob_dtype"] = str
        expected = {field.name: types.get(field.name, int) for field in fields(cls)}
        found = content if isinstance(content, dict) else {}
        odd = [name for name, kind in expected.items() if not isinstance(found.get(name), kind)]
        if not odd:
            odd = [name for name, kind in expected.items() if kind is int and not _is_count(found[name])]
            odd += ["num_rows"] * (not all(map(_is_count, found["num_rows"].values())))
            odd += ["corpora"] * (not all(map(_is_digest, found["corpora"].values())))
        whole = not odd and found.keys() == expected.keys()
        if not whole or found["corpora"].keys() != found["num_rows"].keys():
            raise ValueError(
                f"'{folder}/manifest.json' is not a manifest of teacher logits: {odd[:3] or sorted(found)} do not fit. "
                "Write the folder again with `teach`."
            )
        return cls(**found)

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Stored types of tokens and of log-probabilities."""
        token_dtype = torch.int16 if self.vocab_size <= _LARGEST_INT16 else torch.int32
        return token_dtype, torch.float16 if self.log_prob_dtype == "float16" else torch.float32

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's targets."""
        return self.sequence_length * self.k * sum(dtype.itemsize for dtype in self.dtypes)

    def rows_of(self, corpus: str, *, first: int) -> range:
        """Rows in the shard that begins with row `first`."""
        return range(first, min(first + self.shard_rows, self.num_rows[corpus]))

    def shards(self, corpus: str) -> dict[int, str]:
        """First row -> file name, for each shard of a corpus."""
        rows = range(0, self.num_rows[corpus], self.shard_rows)
        return {first: self.shard_name(corpus, first=first) for first in rows}

    def shard_name(self, corpus: str, *, first: int) -> str:
        """File of the shard that begins with row `first`."""
        return f"{self.corpora[corpus][:16]}-{first:08d}.safetensors"


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**62


def _is_digest(value: object) -> bool:
    """SHA-256 in hexadecimal: it becomes part of a file's name."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def rows_digest(rows: Rows) -> str:
    """Digest of the tokens of all rows and their lengths; which of them carry loss does not matter to a teacher."""
    return digest_of_tensors({"input_ids": rows.input_ids_NS, "length": rows.length_N})


class TeacherLogits:
    """A complete folder of teacher logits, opened; rows are read from disk when they are asked for.

    Args:
        folder: what `teach` wrote.

    Raises:
        ValueError: the manifest is missing or damaged, or a shard is missing, damaged or of another form.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = TeacherManifest.load(folder)
        self._shards = {digest: dict(self._open_all(corpus)) for corpus, digest in self.manifest.corpora.items()}

    def of_rows(self, rows: Rows, *, corpus: str) -> "TaughtRows":
        """The rows of one corpus with their targets.

        Raises:
            ValueError: the folder has no logits of these rows.
        """
        length = rows.input_ids_NS.shape[1]
        if length != self.manifest.sequence_length:
            raise ValueError(
                f"The teacher logits in '{self.folder}' are of rows of {self.manifest.sequence_length} tokens, and "
                f"`data.sequence_length` is {length}. Set it to theirs, or run `teach` again."
            )
        digest = rows_digest(rows)
        if digest not in self._shards:
            raise ValueError(
                f"The teacher logits in '{self.folder}' are of other rows than training corpus '{corpus}': its text, "
                f"`max_tokens` or tokenizer differ from those of {sorted(self.manifest.corpora)}. Run `teach` again "
                "with this data."
            )
        return TaughtRows(rows, shards=self._shards[digest], source=self)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError where the student has another vocabulary than the teacher had."""
        if vocab_size != self.manifest.vocab_size:
            raise ValueError(
                f"The teacher logits in '{self.folder}' are of a vocabulary of {self.manifest.vocab_size} tokens, and "
                f"the student has {vocab_size}: '{self.manifest.teacher}' is not its unpruned model."
            )

    def _open_all(self, corpus: str) -> Iterator[tuple[int, LazyTensors]]:
        manifest = self.manifest
        for first in range(0, manifest.num_rows[corpus], manifest.shard_rows):  # the first that is missing ends it
            name = manifest.shard_name(corpus, first=first)
            if not (self.folder / name).exists():
                raise ValueError(
                    f"The teacher logits in '{self.folder}' are not complete: {name} of corpus '{corpus}' is missing. "
                    "Run the same `teach` again; it goes on where it stopped."
                )
            yield first, open_shard(self.folder / name, rows=manifest.rows_of(corpus, first=first))


class TaughtRows(Dataset[dict[str, Tensor]]):
    """Training rows that bring along a teacher's targets: `teacher_ids` and `teacher_logprobs`, `[S, k]`.

    Args:
        rows: the rows themselves.
        shards: first row -> tensors of a shard.
        source: the folder they come from.
    """

    def __init__(self, rows: Rows, *, shards: Mapping[int, LazyTensors], source: TeacherLogits) -> None:
        self.rows, self.manifest, self.folder = rows, source.manifest, source.folder
        self._shards = shards

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row; its targets are read now.

        Raises:
            ValueError: the shard was damaged.
        """
        shard = self._shards[index - index % self.manifest.shard_rows]
        token_Sk, log_prob_Sk = shard[token_name(index)], shard[log_prob_name(index)]
        size = (self.manifest.sequence_length, self.manifest.k)
        if (
            tuple(token_Sk.shape) != size
            or tuple(log_prob_Sk.shape) != size
            or int(token_Sk.min()) < 0
            or int(token_Sk.max()) >= self.manifest.vocab_size
            or not bool((log_prob_Sk < 0.01).all())  # NaN is not below it either
        ):
            raise ValueError(f"Row {index} of the teacher logits in '{self.folder}' is damaged. Run `teach` again.")
        return self.rows[index] | {TEACHER_IDS: token_Sk, TEACHER_LOGPROBS: log_prob_Sk}


def open_shard(path: Path, *, rows: range) -> LazyTensors:
    """The tensors of a shard, each read when it is asked for.

    Raises:
        ValueError: it is missing or damaged, or holds other rows.
    """
    tensors, _ = open_tensors(path, what="shard of teacher logits")
    own = (name for index in rows for name in (token_name(index), log_prob_name(index)))
    if len(tensors) != 2 * len(rows) or set(tensors) != set(own):
        raise ValueError(f"'{path}' does not hold rows {rows[0]} to {rows[-1]}. Write it again.")
    return tensors


def token_name(index: int) -> str:
    """Name of a row's tokens in its shard."""
    return f"ids.{index}"


def log_prob_name(index: int) -> str:
    """Name of a row's log-probabilities in its shard."""
    return f"log_probs.{index}"
