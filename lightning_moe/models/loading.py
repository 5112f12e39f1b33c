"""Load a language model by folder, shipped asset or hub name."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

import lightning_moe.models.deepseek  # noqa: F401  (registers the model type)
from lightning_moe.assets import resolve_asset
from lightning_moe.files import read_json
from lightning_moe.models.checkpoint_checks import (
    check_complete,
    check_joined,
    check_parts,
    check_range,
    check_tied,
    check_types,
    dropped_keys,
    files_by_name,
    keys_by_name,
    warn_of_dropped,
)
from lightning_moe.models.families import FAMILIES, REFUSED, family_of
from lightning_moe.models.fp8 import dequantised, is_fp8, quantization_of, without_quantization
from lightning_moe.models.stored_tensors import LazyTensor, Part, open_files
from lightning_moe.progress import quiet_transformers

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
# Fields of a config that count something there is at least one of.
_COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "moe_intermediate_size",
)
_ANEW = "Write or download it again."


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
            with config_errors(source):
                return AutoModelForCausalLM.from_config(config, dtype=scratch_dtype)
        is_local = _looks_like_a_path(source)
        tensors = open_source(source)[0] if is_local or is_fp8(config) else {}
        if is_fp8(config):
            return _load_fp8(source, config=config, tensors=tensors, dtype=dtype)
        location = _location(source)
        with joining_errors(config, tensors=tensors):
            return _load_whole(
                location, tensors=tensors, pretrained_model_name_or_path=location, dtype=torch_dtype(dtype)
            )


def torch_dtype(name: DtypeName) -> torch.dtype | Literal["auto"]:
    """What `from_pretrained` takes."""
    return "auto" if name == "auto" else getattr(torch, name)


def read_config(source: str, *, any_family: bool = False) -> PretrainedConfig:
    """The config of a source of a known family (or of `any_family`).

    Raises:
        ValueError: there is no such folder, its config cannot be read, or the family is not supported.
    """
    with clear_errors(source):
        location = _location(source)
        if _looks_like_a_path(source):
            read_json(Path(location) / "config.json", what="model config")
        with config_errors(source):
            config = AutoConfig.from_pretrained(location)
    if not any_family or config.get_text_config().model_type in {*REFUSED, *FAMILIES}:
        check_values(config, source=source)
    return config


def check_values(config: PretrainedConfig, *, source: str) -> None:
    """Refuses a config of an unknown family, or with values that no model of it can have.

    Args:
        config: as transformers reads it.
        source: folder, asset, hub name or file that it is of.

    Raises:
        ValueError: see above; the message names the file and the field.
    """
    text = config.get_text_config()
    experts = family_of(text).expert_count
    values = text.to_dict() | {experts: getattr(text, experts)}  # it may be the other name of another field
    for name in (*_COUNTS, experts):
        value = values.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{_unusable(source)}: `{name}` must be an integer above 0, got {value!r}. {_ANEW}")
    activation = values.get("hidden_act", "silu")
    if activation not in ACT2FN:
        raise ValueError(
            f"{_unusable(source)}: `hidden_act` must be an activation that transformers knows, such as 'silu', got "
            f"{activation!r}. {_ANEW}"
        )


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
    read_index(index)
    with clear_errors(source):
        return [Path(file) for file in get_checkpoint_shard_files(_location(source), str(index))[0]]


def read_index(path: Path) -> dict[str, str]:
    """File of each stored tensor, from an index of shards.

    Raises:
        ValueError: it is not what transformers relies on, or names a file outside its folder.
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


def is_stock(source: str, *, config: PretrainedConfig) -> bool:
    """Whether a source of this config is neither cut nor adapted, and stored in 16 or 32 bit or in FP8."""
    if quantization_of(config) and not is_fp8(config):
        return False
    return find_file(source, "adapter_config.json") is None


def can_stream(source: str) -> bool:
    """Whether a source is what `StockFolder` reads: neither cut, quantised nor adapted, and stored in safetensors.

    Raises:
        ValueError: see `read_config`; or a shard is missing, or their index is damaged.
    """
    return is_stock(source, config=read_config(source)) and bool(weight_files(source))


def generation_config_of(source: str) -> GenerationConfig:
    """The one `from_pretrained` takes: made of the model's config where there is none or it cannot be read."""
    find_file(source, "generation_config.json")  # downloads it
    config = find_file(source, "config.json")
    assert config is not None
    try:
        return GenerationConfig.from_pretrained(config.parent)
    except OSError:
        return GenerationConfig.from_pretrained(config.parent, "config.json", _from_model_config=True)


@contextmanager
def config_errors(source: str) -> Iterator[None]:
    """What transformers raises for values of config.json that it cannot use becomes a ValueError that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (StrictDataclassError, AttributeError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{_unusable(source)}: {type(error).__name__}: {error}. {_ANEW}") from error
    except ValueError as error:
        if "does not recognize this architecture" not in str(error):
            raise
        supported = ", ".join(sorted(FAMILIES))
        raise ValueError(f"'{source}': {str(error).splitlines()[0]} Supported here: {supported}.") from error


def _unusable(source: str) -> str:
    path = source if source.endswith(".json") else find_file(source, "config.json")
    return f"'{path}' holds a value that the model cannot be made with"


@contextmanager
def joining_errors(config: PretrainedConfig, *, tensors: Mapping[str, LazyTensor]) -> Iterator[None]:
    """What transformers raises where it cannot join tensors to a weight becomes a ValueError that names the file.

    Args:
        config: of the model, as its folder has it.
        tensors: what the files hold.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if not quantization_of(config):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(deepcopy(config))
            keys = keys_by_name(model, keys=tensors, conversions=get_model_conversion_mapping(model))
            check_parts(keys, tensors=tensors)
            check_joined(keys, tensors=tensors, state=model.state_dict())
        raise


@contextmanager
def clear_errors(source: str) -> Iterator[None]:
    """What transformers raises for a bad folder becomes a ValueError that names it; lack of memory stays what it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"The model '{source}' cannot be loaded: {error}") from error


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


def _load_whole(
    source: str, *, tensors: Mapping[str, LazyTensor], model_class: Any = AutoModelForCausalLM, **settings: Any
) -> PreTrainedModel:
    """`from_pretrained`, and what it would not say; `tensors` is empty where the files are not on this machine yet."""
    with quiet_transformers():
        loaded: Any = model_class.from_pretrained(
            output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **settings
        )
    model, report = loaded
    conversions = get_model_conversion_mapping(model, hf_quantizer=vars(model).get("hf_quantizer"))
    keys = keys_by_name(model, keys=tensors, conversions=conversions)
    check_complete(report, source=source, files=files_by_name(keys, tensors=tensors))
    state = model.state_dict()
    check_types(keys, tensors=tensors, state=state)
    check_range(keys, tensors=tensors, state=state)
    check_tied(keys, tensors=tensors, tied=model.get_expanded_tied_weights_keys(all_submodels=True))
    silent = {name: keys[name] for name in keys if name not in report["unexpected_keys"]}
    warn_of_dropped(dropped_keys(silent, names=state), source=source)
    return model


def _load_fp8(
    source: str, *, config: PretrainedConfig, tensors: Mapping[str, LazyTensor], dtype: DtypeName
) -> PreTrainedModel:
    """The model that an 8-bit checkpoint was quantised from, tensor by tensor."""
    tensors = dequantised(tensors, config=config, type_name="F32" if dtype == "float32" else "BF16")
    config = without_quantization(config)
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    model = _load_whole(
        source,
        tensors=tensors,
        model_class=model_class,
        pretrained_model_name_or_path=None,
        config=config,
        state_dict={key: Part(tensor=tensor, dtype=tensor.dtype) for key, tensor in tensors.items()},
        dtype=(config.dtype or torch.bfloat16) if dtype == "auto" else torch_dtype(dtype),
    )
    model.config.name_or_path = config.name_or_path
    model.generation_config = generation_config_of(source)
    return model


def _looks_like_a_path(source: str) -> bool:
    """Whether a source can only mean a local folder (a hub name is `owner/name`)."""
    return source.startswith((".", "/", "~", "asset:")) or source.count("/") != 1 or Path(source).exists()
