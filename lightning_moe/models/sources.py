"""Where the files of a source are: a folder, a shipped asset, or a name on the hub."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from lightning_moe.assets import resolve_asset
from lightning_moe.files import one_line, read_json
from lightning_moe.models.stored_tensors import LazyTensor, open_files


def find_file(source: str, name: str) -> Path | None:
    """Where a file of a source is on this machine (a hub's is downloaded); None if it has no such file."""
    with clear_errors(source):
        found = cached_file(location_of(source), name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def weight_files(source: str) -> list[Path]:
    """The safetensors files that `from_pretrained` reads; none where the weights are stored in another way.

    Raises:
        ValueError: a shard is missing, or their index is damaged.
    """
    single = find_file(source, "model.safetensors")
    if single is not None:
        return [single]
    index = find_file(source, "model.safetensors.index.json")
    if index is None:
        return []
    read_index(index)
    with clear_errors(source):
        return [Path(file) for file in get_checkpoint_shard_files(location_of(source), str(index))[0]]


def read_index(path: Path) -> dict[str, str]:
    """File of each stored tensor, from an index of shards.

    Raises:
        ValueError: it is not what transformers relies on, or names a file outside its folder or one that cannot be.
    """
    index = read_json(path, what="index of shards")
    parts = index if isinstance(index, dict) else {}
    files = parts.get("weight_map")
    is_map = isinstance(files, dict) and all(isinstance(file, str) for file in files.values())
    if not isinstance(files, dict) or not is_map or not isinstance(parts.get("metadata"), dict):
        raise ValueError(
            f"'{path}' is not an index of shards: it must hold `weight_map`, a file name for each weight, and "
            "`metadata`, a mapping. Write or download it again."
        )
    for name in files.values():
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\\" in name:
            raise ValueError(f"'{path}' names a file outside its folder: {name!r}. Do not use this checkpoint.")
        if not name.isprintable():
            raise ValueError(f"'{path}' names a file of unprintable letters: {name!r}. Write or download it again.")
    return files


def open_source(source: str) -> tuple[dict[str, LazyTensor], str]:
    """The stored tensors of a source, of which nothing is read yet, and a digest of its config and files.

    Raises:
        ValueError: see `open_files`; or a shard is missing, or their index is damaged.
    """
    files, config = weight_files(source), find_file(source, "config.json")
    assert config is not None
    if not files:
        raise ValueError(
            f"'{source}' has no safetensors files. Weights in other files (`*.bin`, `*.pt`) are not read: they could "
            "run code. Whoever trusts them converts them with `AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(OTHER_FOLDER)`."
        )
    index = files[0].with_name("model.safetensors.index.json") if files[0].name != "model.safetensors" else None
    tensors, digest = open_files(files, index=index)
    return tensors, hashlib.sha256(config.read_bytes() + digest.encode()).hexdigest()


@contextmanager
def clear_errors(source: str) -> Iterator[None]:
    """What transformers raises for a bad folder becomes a ValueError that names it; lack of memory stays what it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError, ImportError) as error:  # a library that a quantisation needs
        raise ValueError(f"The model '{source}' cannot be loaded: {one_line(error)}.") from error


def refuse_adapter(source: str) -> None:
    """Refuses the folder of an adapter: transformers would load the base that it names, from wherever that is.

    Raises:
        ValueError: it is one.
    """
    if (Path(resolve_asset(source)).expanduser() / "adapter_config.json").is_file():
        raise ValueError(
            f"'{source}' is an adapter, not a model. Merge it into its model first (`export --formats merged`) and "
            "name that folder."
        )


def location_of(source: str) -> str:
    """The folder of a source, or its hub name."""
    if not is_local(source):
        return source
    path = Path(resolve_asset(source)).expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(
            f"There is no model at '{source}': no folder with a config.json. A name on the hub is `owner/name`."
        )
    return str(path)


def is_local(source: str) -> bool:
    """Whether a source can only mean a local folder (a hub name is `owner/name`)."""
    return source.startswith((".", "/", "~", "asset:")) or source.count("/") != 1 or Path(source).exists()
