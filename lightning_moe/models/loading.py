"""Load a language model by folder, shipped asset or hub name."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import lightning_moe.models.deepseek  # noqa: F401  (registers the model type)
from lightning_moe.files import one_line, read_json
from lightning_moe.models.checkpoint_checks import (
    check_complete,
    check_joined,
    check_layers,
    check_parts,
    check_range,
    check_sizes,
    check_tied,
    check_types,
    dropped_keys,
    files_by_name,
    keys_by_name,
    warn_of_dropped,
)
from lightning_moe.models.config_text import check_config_text
from lightning_moe.models.config_values import ANEW, check_values, unusable
from lightning_moe.models.families import FAMILIES, REFUSED
from lightning_moe.models.fp8 import QUANT_METHOD as FP8
from lightning_moe.models.fp8 import dequantised, is_fp8, quantization_of, without_quantization
from lightning_moe.models.saving import QUANT_METHOD as CHANNEL_MOE
from lightning_moe.models.sources import (
    clear_errors,
    find_file,
    is_local,
    location_of,
    open_source,
    refuse_adapter,
    weight_files,
)
from lightning_moe.models.stored_tensors import LazyTensor, Part
from lightning_moe.progress import quiet_transformers

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
_BITSANDBYTES = "bitsandbytes"
_CONFIG_ERRORS = (
    StrictDataclassError,
    AttributeError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)


def load_model(
    source: str, *, dtype: DtypeName = "auto", from_scratch: bool = False, any_family: bool = False
) -> PreTrainedModel:
    """A causal language model of a known MoE family, dense, ragged or packed, in eval mode.

    Args:
        source: folder, `asset:small_moe`, or hub name.
        dtype: type of the unpacked weights; `auto` keeps the stored one.
        from_scratch: random weights in the shape of the source's `config.json` (`auto` means float32 then).
        any_family: any causal language model, also one without experts, and in any quantisation that transformers
            loads: to evaluate it, not to prune it.

    Raises:
        ValueError: the folder does not exist or holds no config, the model's family is not supported, a weight file is
            damaged, or a weight is missing or of another shape.
    """
    config = read_config(source, any_family=any_family)
    refuse_adapter(source)
    with clear_errors(source):
        if from_scratch:
            scratch_dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
            with config_errors(source):
                return AutoModelForCausalLM.from_config(config, dtype=scratch_dtype)
        local = is_local(source)
        tensors = open_source(source)[0] if local or is_fp8(config) else {}
        if is_fp8(config):
            return _load_fp8(source, config=config, tensors=tensors, dtype=dtype)
        location = location_of(source)
        if local:
            generation_config_of(source)  # which transformers reads last, and without a word on what is wrong
        with joining_errors(config, tensors=tensors):
            if local:
                _check_sizes(config, tensors=tensors, source=source)
            return _load_whole(
                location, tensors=tensors, pretrained_model_name_or_path=location, dtype=torch_dtype(dtype)
            )


def torch_dtype(name: DtypeName) -> torch.dtype | Literal["auto"]:
    """What `from_pretrained` takes."""
    return "auto" if name == "auto" else getattr(torch, name)


def read_config(source: str, *, any_family: bool = False) -> PretrainedConfig:
    """The config of a source of a known family (or of `any_family`).

    Raises:
        ValueError: there is no such folder, its config cannot be read, or the family or the quantisation is not
            supported.
    """
    with clear_errors(source):
        location = location_of(source)
        if is_local(source):
            path = Path(location) / "config.json"
            check_config_text(read_json(path, what="model config"), path=str(path))
        with config_errors(source):
            config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    _check_quantization(config, source=source, any_reader=any_family)
    if not any_family or config.get_text_config().model_type in {*REFUSED, *FAMILIES}:
        check_values(config, source=source)
    return config


def _check_quantization(config: PretrainedConfig, *, source: str, any_reader: bool) -> None:
    """Refuses a quantisation that nobody reads: of one that it does not know transformers only warns."""
    found: object = config.to_dict().get("quantization_config")
    if found is None:
        return
    if not (isinstance(found, dict) and isinstance(found.get("quant_method"), str)):
        raise ValueError(
            f"{unusable(source)}: `quantization_config` must be a mapping with a text `quant_method`, got "
            f"{found!r:.60}. {ANEW}"
        )
    method = found["quant_method"]
    is_nf4 = found.get("bnb_4bit_quant_type") == "nf4" and found.get("bnb_4bit_use_double_quant") is True
    if method in (CHANNEL_MOE, FP8) or (method == _BITSANDBYTES and found.get("load_in_4bit") is True and is_nf4):
        return
    if not any_reader or (method not in AUTO_QUANTIZER_MAPPING and method != _BITSANDBYTES):
        raise ValueError(
            f"'{source}' is quantised with {method!r:.60} (`quantization_config` of its config.json), which is not "
            f"read. Supported: weights in 16 or 32 bit, 8-bit floating point with factors for blocks ({FP8!r}), what "
            f"this package writes ({CHANNEL_MOE!r}), and whole, not layer by layer, double-quantised NF4 of "
            f"bitsandbytes ({_BITSANDBYTES!r}). Take the checkpoint that it was quantised from."
        )


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
    """The one `from_pretrained` takes: made of the model's config where there is none or it cannot be read.

    Raises:
        ValueError: it holds values that are none of a generation config.
    """
    own = find_file(source, "generation_config.json")  # downloads it
    config = find_file(source, "config.json")
    assert config is not None
    try:
        return _generation_config(config.parent)
    except (TypeError, AttributeError, LookupError, ValueError, RecursionError) as error:
        raise ValueError(
            f"'{own or config}' holds a value that generation cannot be set up with: {type(error).__name__}: "
            f"{one_line(error)}. {ANEW}"
        ) from error


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(folder, "config.json", _from_model_config=True)


@contextmanager
def config_errors(source: str) -> Iterator[None]:
    """What transformers raises for values of config.json that it cannot use becomes a ValueError that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _CONFIG_ERRORS as error:
        raise ValueError(f"{unusable(source)}: {type(error).__name__}: {one_line(error)}. {ANEW}") from error
    except ValueError as error:
        supported = ", ".join(sorted(FAMILIES))
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"'{source}' brings code of its own (`auto_map` in its config.json), which is not run. Supported here: "
                f"{supported}."
            ) from error
        if "does not recognize this architecture" not in str(error):
            raise
        raise ValueError(f"'{source}': {str(error).splitlines()[0]} Supported here: {supported}.") from error


@contextmanager
def joining_errors(config: PretrainedConfig, *, tensors: Mapping[str, LazyTensor]) -> Iterator[None]:
    """What transformers raises where it cannot join tensors to a weight becomes a ValueError that names the file.

    Its report of that, a table with a traceback, is not shown.

    Args:
        config: of the model, as its folder has it.
        tensors: what the files hold.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_has_no_traceback)
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
    finally:
        logger.removeFilter(_has_no_traceback)


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return "Traceback (most recent call last)" not in record.getMessage()


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


def _check_sizes(config: PretrainedConfig, *, tensors: Mapping[str, LazyTensor], source: str) -> PreTrainedModel:
    """Compares the config with the headers of the files, before transformers takes memory for what is missing there.

    Returns:
        The model, on the meta device.
    """
    check_layers(config.get_text_config().num_hidden_layers, tensors=tensors, source=source)
    with torch.device("meta"), config_errors(source):
        model = AutoModelForCausalLM.from_config(deepcopy(config))
    if quantization_of(config):  # its quantizer compares what it makes of the model
        return model
    keys = keys_by_name(model, keys=tensors, conversions=get_model_conversion_mapping(model))
    state = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    check_sizes(keys, tensors=tensors, state=state, source=source)
    return model


def _load_fp8(
    source: str, *, config: PretrainedConfig, tensors: Mapping[str, LazyTensor], dtype: DtypeName
) -> PreTrainedModel:
    """The model that an 8-bit checkpoint was quantised from, tensor by tensor."""
    tensors = dequantised(tensors, config=config, type_name="F32" if dtype == "float32" else "BF16")
    config = without_quantization(config)
    skeleton = _check_sizes(config, tensors=tensors, source=source)
    model = _load_whole(
        source,
        tensors=tensors,
        model_class=type(skeleton),
        pretrained_model_name_or_path=None,
        config=config,
        state_dict={key: Part(tensor=tensor, dtype=tensor.dtype) for key, tensor in tensors.items()},
        dtype=(config.dtype or torch.bfloat16) if dtype == "auto" else torch_dtype(dtype),
    )
    model.config.name_or_path = config.name_or_path
    model.generation_config = generation_config_of(source)
    return model
