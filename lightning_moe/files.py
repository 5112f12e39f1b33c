"""Files appear under their final name only when they are whole."""

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from lightning_moe.renaming import make_folder, move_into_place, remove, remove_left, temporary_path

# In the order in which a file has them; within a type, tensors are in the order of their names.
_SAFETENSORS_TYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_LARGEST_JSON = 2**28  # bytes; a plan for 48 layers of 128 experts has less than one million
_LONGEST_MESSAGE = 300
# What a write or a flush says of a disk that takes no more, or is broken, without the name of the file.
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are read or computed each time they are asked for: only those in use take memory.

    A pickled one, sent to another process say, arrives as a plain dictionary of tensors.

    Args:
        sources: what makes the tensor of each name.
    """

    def __init__(self, sources: Mapping[str, Callable[[], Tensor]]) -> None:
        self._sources = dict(sources)

    def __getitem__(self, name: str) -> Tensor:
        return self._sources[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._sources  # Mapping's own would make the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        return dict, (dict(self),)


class NativeErrors(AbstractContextManager[None]):
    """Makes an OSError of the plain `Exception` of a library in Rust, which no `except` can tell from all others."""

    @override
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if type(error) is Exception:
            raise OSError(str(error)) from error


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; renames it to `path` when the block ends without an exception.

    Works for a file and for a folder (an existing folder of that name is replaced as a whole). What was there before
    stays untouched until the rename, and every byte is on the disk by then (`move_into_place`).

    Raises:
        OSError: the file cannot be made; where the disk is full or broken the error names `path`.
    """
    path = Path(path)
    make_folder(path.parent)
    remove_left(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        move_into_place(temporary, path)
    except OSError as error:
        if error.errno in _REFUSED and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        remove(temporary)


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, *, what: str) -> Any:
    """Reads JSON.

    Raises:
        ValueError: the file is missing, larger than 256 MiB, not JSON, or gives a key twice; `what` names its purpose
            in the message.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no {what} at '{path}'.")
    if path.stat().st_size > _LARGEST_JSON:
        size = f"{path.stat().st_size:,} bytes, more than {_LARGEST_JSON:,}"
        raise ValueError(f"'{path}' is not a readable {what}: it has {size}. Write it again.")
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:  # a number of more than 4,300 digits is a plain ValueError
        raise ValueError(f"'{path}' is not a readable {what}: {one_line(error)}. Write it again.") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of a JSON file. Of a key that stands there twice people may see one value, and programs the other."""
    content = dict(pairs)
    if len(content) < len(pairs):
        ((double, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{double!r:.80} stands in it twice")
    return content


def one_line(error: BaseException) -> str:
    """What another library says of a file, in one line of at most 300 letters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}...").rstrip(".")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, Any]) -> None:
    """Writes tensors and JSON-able metadata as one safetensors file, atomically: the bytes that `save_file` writes.

    Each tensor is asked for twice, for its place and for its bytes: of `LazyTensors` one at a time is in memory.
    """
    header, names = _header(tensors, metadata={key: json.dumps(value) for key, value in metadata.items()})
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for name in names:
            file.write(_bytes_of(tensors[name]))


def _header(tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """What stands before the bytes of a safetensors file, and the tensors' names in their order."""
    types = list(_SAFETENSORS_TYPES)
    entries = {name: (types.index(value.dtype), list(value.shape), value.nbytes) for name, value in tensors.items()}
    names = sorted(entries, key=lambda name: (entries[name][0], name))
    content: dict[str, Any] = {"__metadata__": metadata}
    first = 0
    for name in names:
        index, shape, size = entries[name]
        offsets = [first, first + size]
        content[name] = {"dtype": _SAFETENSORS_TYPES[types[index]], "shape": shape, "data_offsets": offsets}
        first += size
    encoded = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, names


def _bytes_of(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def open_tensors(path: str | Path, *, what: str) -> tuple[LazyTensors, dict[str, Any]]:
    """Opens what `write_tensors` wrote: (tensors, each read when it is asked for; metadata). The file stays open.

    Another file may take its name meanwhile, as `write_tensors` does it; writing into the file itself is not safe.

    Raises:
        ValueError: the file is missing, truncated or not safetensors with our metadata; when a tensor is asked for:
            the file was truncated meanwhile, or its type is one that PyTorch cannot read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no {what} at '{path}'.")
    try:
        # Plain reads: pages of a mapped file would stay in the process's memory after the tensor is gone.
        file = safe_open(str(path), framework="pt", backend="pread")
        texts = (file.metadata() or {}).items()
        metadata = {key: json.loads(value, object_pairs_hook=_each_once) for key, value in texts}
        keys = list(file.keys())
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"'{path}' is not a readable {what}: {one_line(error)}. Write it again.") from error
    return LazyTensors({key: partial(_read_tensor, file, key, path=path) for key in keys}), metadata


def _read_tensor(file: Any, key: str, *, path: Path) -> Tensor:
    try:
        return file.get_tensor(key)
    except (SafetensorError, RuntimeError, OSError) as error:  # RuntimeError: a type of less than a byte
        raise ValueError(f"'{path}' changed or is damaged: {key}: {one_line(error)}. Write it again.") from error


def read_tensors(path: str | Path, *, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_tensors` wrote: (tensors, metadata).

    Raises:
        ValueError: the file is missing, truncated or not safetensors with our metadata.
    """
    tensors, metadata = open_tensors(path, what=what)
    return dict(tensors), metadata


def read_shapes(path: str | Path, *, what: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a safetensors file, from its header alone.

    Raises:
        ValueError: the file is missing, truncated or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no {what} at '{path}'.")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"'{path}' is not a readable {what}: {one_line(error)}. Write or download it again."
        ) from error


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(_bytes_of(value))
    return digest.hexdigest()


def folder_bytes(path: str | Path) -> int:
    """Bytes of all files below `path` (or of the file itself)."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
