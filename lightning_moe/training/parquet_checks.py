"""What a parquet file holds, before it is read: a few hundred bytes can stand for gigabytes of repeated text."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.parquet import FileMetaData, ParquetFile

# Text is rarely compressed to a tenth. A file may stand for so many times its length, and always for so many bytes.
_MOST_TIMES, _ALWAYS_ALLOWED = 100, 2**28
_NUMBER_BYTES = 8  # of a number, or of the place of a text


def check_parquet(file: str | Path, *, name: str) -> None:
    """Refuses a file that holds very much more than it is long.

    Its footer says what decompressing it takes. It does not say what a dictionary stands for, which holds a text once
    and the rows that have it: of those the lengths are added up, and no text is written out.

    Args:
        file: to look through, the texts of a row group in memory at a time.
        name: of the corpus, for the message.

    Raises:
        ValueError: see above.
        ArrowException: it is no parquet file.
    """
    size = Path(file).stat().st_size
    most, held = max(_ALWAYS_ALLOWED, _MOST_TIMES * size), 0
    with ParquetFile(file) as parquet:
        footer = parquet.metadata
    if _footer_bytes(footer) <= most:
        for group_bytes in _text_bytes(file, footer=footer):
            held += group_bytes
            if held > most:
                break
        else:
            return
    raise ValueError(
        f"Corpus {name!r}: '{file}' is {size:,} bytes long and stands for more than {most:,}, as no text does. Do not "
        "use it; if it is what you want, write it as .jsonl."
    )


def _footer_bytes(footer: FileMetaData) -> int:
    groups = (footer.row_group(index) for index in range(footer.num_row_groups))
    columns = [group.column(index) for group in groups for index in range(footer.num_columns)]
    return sum(max(column.total_uncompressed_size, column.num_values * _NUMBER_BYTES) for column in columns)


def _text_bytes(file: str | Path, *, footer: FileMetaData) -> Iterator[int]:
    """Bytes of the texts of each row group, dictionaries left as they are."""
    leaves = [footer.schema.column(index) for index in range(footer.num_columns)]
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL"]
    with ParquetFile(file, read_dictionary=texts) as parquet:
        for index in range(footer.num_row_groups if texts else 0):
            table = parquet.read_row_group(index, columns=texts, use_threads=False)
            yield sum(_length(part) for column in table.columns for part in column.chunks)


def _length(array: pa.Array) -> int:
    """Bytes of all texts in a column, in lists and records too."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.call_function("binary_length", [array.dictionary]).take(array.indices)
        return pc.call_function("sum", [lengths]).as_py() or 0
    if pa.types.is_map(kind):
        return _length(array.keys) + _length(array.items)
    if pa.types.is_struct(kind):
        return sum(map(_length, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _length(array.flatten())
    if isinstance(array, pa.ExtensionArray):
        return _length(array.storage)
    return array.nbytes
