"""Named corpora: which file or hub data set, in which format, and how its records are read."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset, config, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.extract import Extractor
from pyarrow import ArrowException

from lightning_moe.assets import ASSET_PREFIX, resolve_asset
from lightning_moe.progress import quiet_datasets
from lightning_moe.training.json_checks import check_json
from lightning_moe.training.parquet_checks import check_parquet

_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Of each builder: what its files are looked through for before it reads them, and how it reads them.
_CHECKS = {"json": check_json, "parquet": check_parquet}
_OPTIONS: dict[str, dict[str, Any]] = {"text": {"sample_by": "document"}, "parquet": {"batch_size": 1000}}
_UNREADABLE = (DatasetGenerationError, DatasetNotFoundError, ArrowException)
# `datasets` would take such a name for a pattern or an address, and read other files.
_PATTERN_MARKS = ("*", "?", "[", "]", "{", "}", "::")
FORMATS = ("text", "instruction", "messages")
# Kinds of columns that `datasets` reads as they stand; the others hold names of files and addresses, which it opens.
_PLAIN = {"Value", "ClassLabel", "Json", "List", "LargeList", "Sequence", "Translation", "TranslationVariableLanguages"}
_PLAIN |= {"Array2D", "Array3D", "Array4D", "Array5D"}

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    r"""One corpus.

    Args:
        source: A `.txt` (one document a file), `.jsonl`, `.json` or `.parquet` file, a folder or glob pattern of such
            files, `asset:text/code/recovery.jsonl` for a shipped file, or the name of a data set on the hub.
        format: `text`: documents, loss on every token. `instruction`: instruction, perhaps input, and output in
            Alpaca's prompt, loss on the output. `messages`: conversations through the tokenizer's chat template, loss
            on the assistant's turns.
        field: Field that holds the text or the messages; by default `text` or `messages`.
        instruction_field: Field of the instruction.
        input_field: Field of the instruction's input; null where the corpus has none.
        output_field: Field of the answer.
        separator: String that joins text documents instead of the end-of-text token (`"\n\n"` for WikiText's lines).
        subset: Configuration of the hub data set.
        split: Split of the hub data set.
        max_tokens: Take only so many tokens; a hub data set is then streamed and not downloaded whole. Where several
            samples are asked for (`compare`), each takes the next so many.
        shuffle_seed: Read the records in an order shuffled by this seed; null keeps their order.
    """

    source: str
    format: Literal["text", "instruction", "messages"] = "text"
    field: str | None = None
    instruction_field: str = "instruction"
    input_field: str | None = "input"
    output_field: str = "output"
    separator: str | None = None
    subset: str | None = None
    split: str = "train"
    max_tokens: int | None = None
    shuffle_seed: int | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields a record must have."""
        if self.format == "instruction":
            return tuple(
                name for name in (self.instruction_field, self.input_field, self.output_field) if name is not None
            )
        return (self.field or self.format,)


def check_corpus(corpus: Corpus, *, name: str) -> None:
    """Check what can be checked without reading.

    Raises:
        ValueError: Unknown format, `max_tokens` below 1, or files that are missing or empty.
    """
    if corpus.format not in FORMATS:
        raise ValueError(f"Corpus {name!r}: unknown format {corpus.format!r}. Use one of {', '.join(FORMATS)}.")
    if corpus.max_tokens is not None and corpus.max_tokens < 1:
        raise ValueError(f"Corpus {name!r}: `max_tokens` must be at least 1 or null for all, got {corpus.max_tokens}.")
    if corpus.shuffle_seed is not None and corpus.shuffle_seed < 0:
        raise ValueError(f"Corpus {name!r}: `shuffle_seed` must be at least 0 or null, got {corpus.shuffle_seed}.")
    if "\0" in corpus.source:
        raise ValueError(f"Corpus {name!r}: `source` cannot hold the character NUL, got {corpus.source!r}.")
    if _is_local(corpus.source):
        _local_files(corpus.source, name=name)


def read_records(corpus: Corpus, *, name: str) -> Iterator[Record]:
    """Yield the records of a corpus, its fields checked on the first one.

    Raises:
        ValueError: The source is missing, cannot be read, is empty, or lacks a field; also later, while it is read.
    """
    iterator = _read(corpus, name=name)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"Corpus {name!r}: {corpus.source!r} is empty. Give a source with at least one record.")
    for field in corpus.fields:
        if field not in first:
            raise ValueError(
                f"Corpus {name!r}: {corpus.source!r} has no field {field!r}, only {', '.join(sorted(first))}. "
                "Name the right one: `field`, or for instructions `instruction_field`, `input_field`, `output_field`."
            )
    return chain([first], iterator)


def _read(corpus: Corpus, *, name: str) -> Iterator[Any]:
    try:
        yield from _open(corpus, name=name)
    except (*_UNREADABLE, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise ValueError(
            f"Corpus {name!r}: cannot read {corpus.source!r} ({' '.join(str(cause).split())}). Give a valid file or "
            f"folder of {', '.join(_BUILDERS)}, or a hub data set that can be reached, with its subset and split."
        ) from error


def _open(corpus: Corpus, *, name: str) -> Dataset | IterableDataset:
    if _is_local(corpus.source):
        files = _local_files(corpus.source, name=name)
        builder = _BUILDERS[Path(files[0]).suffix]
        for file in files:
            _check_plain(file, name=name)
        for file in files:
            if builder in _CHECKS:
                _CHECKS[builder](file, name=name)
        options = _OPTIONS.get(builder, {})
        with quiet_datasets(), _untold():
            records = load_dataset(builder, data_files={"train": files}, split="train", **options)
    else:
        streaming = corpus.max_tokens is not None
        records = load_dataset(corpus.source, corpus.subset, split=corpus.split, streaming=streaming)
    records = _without_media(records)
    return records if corpus.shuffle_seed is None else records.shuffle(seed=corpus.shuffle_seed)


def _without_media(records: Any) -> Any:
    """Without the columns of images, sound and the like: whoever wrote them says which file or address is opened."""
    kinds = {} if records.features is None else records.features.to_dict()
    media = [name for name, kind in kinds.items() if not set(_kinds_in(kind)) <= _PLAIN]
    return records.remove_columns(media) if media else records


def _kinds_in(kind: Any) -> Iterator[str]:
    """Names of the kinds that a column is made of."""
    if isinstance(kind, dict) and isinstance(kind.get("_type"), str):
        yield kind["_type"]
    for part in kind.values() if isinstance(kind, dict) else kind if isinstance(kind, list) else ():
        yield from _kinds_in(part)


def _check_plain(file: str, *, name: str) -> None:
    """Refuses an archive: `datasets` would unpack one, whatever its name, into its cache before it reads it."""
    kind = Extractor.infer_extractor_format(file)
    if kind is not None:
        raise ValueError(f"Corpus {name!r}: '{file}' is a {kind} archive. Unpack it, and name what was in it.")


@contextmanager
def _untold() -> Iterator[None]:
    """Without the request by which `datasets` counts what is loaded, files of this machine too."""
    counted = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = counted


def _is_local(source: str) -> bool:
    """A hub name has at most one slash and no file ending we read; anything that exists is local."""
    if source.startswith((ASSET_PREFIX, "/", ".", "~")) or has_magic(source) or Path(source).exists():
        return True
    return Path(source).suffix in _BUILDERS or source.count("/") > 1


def _local_files(source: str, *, name: str) -> list[str]:
    path = Path(resolve_asset(source)).expanduser()
    if path.is_file():
        files = [str(path)]
    else:
        pattern = str(path / "**" / "*") if path.is_dir() else str(path)
        files = sorted(file for file in glob(pattern, recursive=True) if Path(file).suffix in _BUILDERS)
    suffixes = {Path(file).suffix for file in files}
    builders = {_BUILDERS.get(suffix) for suffix in suffixes}
    if not files:
        raise ValueError(
            f"Corpus {name!r}: no file found at {source!r}. "
            f"Give a file, folder or pattern of {', '.join(_BUILDERS)} files."
        )
    if len(builders) > 1 or None in builders:
        raise ValueError(
            f"Corpus {name!r}: {source!r} holds files of type {', '.join(sorted(suffixes))}. "
            f"Give files of one type among {', '.join(_BUILDERS)}."
        )
    odd = next((file for file in files if any(mark in file for mark in _PATTERN_MARKS)), None)
    if odd is not None:
        raise ValueError(
            f"Corpus {name!r}: the name '{odd}' would be read as a pattern of names. Rename it, without "
            f"{' '.join(_PATTERN_MARKS)}."
        )
    filled = [file for file in files if Path(file).stat().st_size]
    if not filled:
        raise ValueError(f"Corpus {name!r}: {source!r} is empty. Give a file with at least one record.")
    return filled
