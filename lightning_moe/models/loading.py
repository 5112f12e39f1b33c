"""Load a language model by folder, shipped asset or hub name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

import lightning_moe.models.deepseek  # noqa: F401  (registers the model type)
from lightning_moe.assets import resolve_asset
from lightning_moe.files import read_json, read_shapes
from lightning_moe.models.families import REFUSED, family_of
from lightning_moe.progress import quiet_transformers

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def load_model(
    source: str, *, dtype: DtypeName = "auto", from_scratch: bool = False, any_family: bool = False
) -> PreTrainedModel:
    """A causal language model of a known MoE family, dense, ragged or packed, in eval mode.

    Args:
        source: folder, `asset:small_moe`, or hub name.
        dtype: type of the unpacked weights; `auto` keeps the stored one.
        from_scratch: random weights in the shape of the source's `config.json` (`auto` means float32 then).
        any_family: any causal language model, also one without experts: to evaluate it, not to prune it.

    Raises:
        ValueError: the folder does not exist or holds no config, the model's family is not supported, a weight file is
            damaged, or a weight is missing or of another shape.
    """
    config = read_config(source, any_family=any_family)
    with clear_errors(source):
        if from_scratch:
            scratch_dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
            return AutoModelForCausalLM.from_config(config, dtype=scratch_dtype)
        location = _location(source)
        for file in weight_files(source) if _looks_like_a_path(source) else []:
            read_shapes(file, what="file of weights")
        return _load_whole(location, dtype=torch_dtype(dtype))


def torch_dtype(name: DtypeName) -> torch.dtype | Literal["auto"]:
    """What `from_pretrained` takes."""
    return "auto" if name == "auto" else getattr(torch, name)


def read_config(source: str, *, any_family: bool = False) -> PretrainedConfig:
    """The config of a source of a known family (or of `any_family`).

    Raises:
        ValueError: there is no such folder, its config cannot be read, or the family is not supported.
    """
    with clear_errors(source):
        config = AutoConfig.from_pretrained(_location(source))
    if not any_family or config.get_text_config().model_type in REFUSED:
        family_of(config.get_text_config())
    return config


def find_file(source: str, name: str) -> Path | None:
    """Where a file of a source is on this machine (a hub's is downloaded); None if it has no such file."""
    with clear_errors(source):
        found = cached_file(_location(source), name, _raise_exceptions_for_missing_entries=False)
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
    _check_index(index)
    with clear_errors(source):
        return [Path(file) for file in get_checkpoint_shard_files(_location(source), str(index))[0]]


def _check_index(path: Path) -> None:
    """Raises ValueError where an index of shards is not what transformers relies on."""
    index = read_json(path, what="index of shards")
    parts = index if isinstance(index, dict) else {}
    files = parts.get("weight_map")
    is_map = isinstance(files, dict) and all(isinstance(file, str) for file in files.values())
    if not is_map or not isinstance(parts.get("metadata"), dict):
        raise ValueError(
            f"'{path}' is not an index of shards: it must hold `weight_map`, a file name for each weight, and "
            "`metadata`, a mapping. Write or download it again."
        )


def can_stream(source: str) -> bool:
    """Whether a source is what `StockFolder` reads: neither cut, quantised nor adapted, and stored in safetensors.

    Raises:
        ValueError: see `read_config`; or a shard is missing, or their index is damaged.
    """
    if "quantization_config" in read_config(source).to_dict():
        return False
    return find_file(source, "adapter_config.json") is None and bool(weight_files(source))


@contextmanager
def clear_errors(source: str) -> Iterator[None]:
    """What transformers raises for a bad folder becomes a ValueError that names it; lack of memory stays what it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"The model '{source}' cannot be loaded: {error}") from error


def check_complete(report: Mapping[str, Any], *, source: str) -> None:
    """Refuses what transformers only warns of before it fills the gaps with random numbers.

    Args:
        report: from `from_pretrained(..., output_loading_info=True)`.
        source: named in the message.

    Raises:
        ValueError: weights are missing or of another shape.
    """
    missing = _names(report["missing_keys"])
    if missing:
        raise ValueError(
            f"'{source}' lacks {len(missing)} weights of its model, such as {missing[:3]}. Write it again."
        )
    mismatched = _names(key for key, *_ in report["mismatched_keys"])
    if mismatched:
        raise ValueError(
            f"{len(mismatched)} weights of '{source}' have another shape than its config.json says, "
            f"such as {mismatched[:3]}."
        )


def _location(source: str) -> str:
    """The folder of a source, or its hub name."""
    if not _looks_like_a_path(source):
        return source
    path = Path(resolve_asset(source)).expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(
            f"There is no model at '{source}': no folder with a config.json. A name on the hub is `owner/name`."
        )
    return str(path)


def _load_whole(location: str, *, dtype: torch.dtype | str) -> PreTrainedModel:
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, report = loaded
    check_complete(report, source=location)
    return model


def _names(keys: Any) -> list[str]:
    return sorted(str(key) for key in keys)


def _looks_like_a_path(source: str) -> bool:
    """Whether a source can only mean a local folder (a hub name is `owner/name`)."""
    return source.startswith((".", "/", "~", "asset:")) or source.count("/") != 1 or Path(source).exists()
