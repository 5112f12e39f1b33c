"""Adapter folders in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

With stock PEFT only: `import lightning_moe`, load the base with `AutoModelForCausalLM.from_pretrained`, then
`PeftModel.from_pretrained(model, folder, config=adapter_config_of(folder, model=model))`. PEFT does not store which
layer classes serve experts and routers, so without `config=` it refuses the folder.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.adapters.inject import MoeLoraConfig, register_layers
from lightning_moe.adapters.settings import checked_settings
from lightning_moe.files import one_line, read_json, read_tensors, write_atomically, write_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# Where a config came from, not what it says.
_WHERE = ("auto_mapping", "base_model_name_or_path", "peft_version", "revision")
AdapterDtype = Literal["float32", "float16"]


def save_adapter(peft_model: PeftModel, *, folder: str | Path, dtype: AdapterDtype = "float32") -> None:
    """Writes the active adapter; the folder appears when it is whole and replaces an older one.

    `float16` halves the file; values are rounded to 11 bits, so a reload differs from the trained adapter by that much.

    Raises:
        ValueError: an unknown type, or values that float16 cannot hold.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"Adapters are stored as 'float32' or 'float16', got '{dtype}'.")
    tensors = {name: value.detach().to(getattr(torch, dtype)) for name, value in adapter_tensors(peft_model).items()}
    infinite = [name for name, value in tensors.items() if not value.isfinite().all()]
    if infinite:
        raise ValueError(
            f"'{infinite[0]}' has values that are not finite in {dtype}. Store it as float32, or look at it."
        )
    config = peft_model.peft_config[_active_name(peft_model)]
    with write_atomically(folder) as temporary:
        temporary.mkdir()
        write_tensors(temporary / WEIGHTS_NAME, tensors, metadata={})
        was_inference, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(temporary))
        config.inference_mode = was_inference


def load_adapter(model: PreTrainedModel, *, folder: str | Path, trainable: bool = False) -> PeftModel:
    """Puts a saved adapter on the model it was made for (its structure, that is), in place; parameters are fp32.

    Args:
        model: the base model, cut like the one the adapter was trained on.
        folder: what `save_adapter` wrote.
        trainable: continue training; otherwise nothing requires a gradient.

    Raises:
        ValueError: no or unreadable files, or an adapter for another structure (the first tensor that differs is named;
            the model is left without an adapter).
    """
    loaded, _ = read_tensors(Path(folder) / WEIGHTS_NAME, what="adapter")
    config = adapter_config_of(folder, model=model)
    config.inference_mode = not trainable
    config.base_model_name_or_path = model.name_or_path or None  # the base may have moved: PEFT would warn
    peft_model = _inject(model, config, source=f"{folder}/{CONFIG_NAME}")
    expected = adapter_tensors(peft_model)
    difference = _first_difference(expected, loaded)
    if difference is not None:
        peft_model.unload()
        raise ValueError(f"The adapter in '{folder}' was made for another model: {difference}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(loaded[name])
    return peft_model


def adapter_config_of(folder: str | Path, *, model: PreTrainedModel) -> LoraConfig:
    """The PEFT config in a folder, with our layer classes registered for this model.

    Raises:
        ValueError: the file is missing, unreadable, or not a LoRA config.
    """
    content = read_json(Path(folder) / CONFIG_NAME, what="adapter config")
    return _config_of(content, model=model, source=f"{folder}/{CONFIG_NAME}")


def adapter_settings(model: PreTrainedModel) -> dict[str, Any] | None:
    """PEFT's settings of the one LoRA or DoRA adapter that is in a model, plain types; None where there is not one."""
    configs = vars(model).get("peft_config", {})
    if len(configs) != 1 or not isinstance(config := next(iter(configs.values())), LoraConfig):
        return None
    settings = {key: value for key, value in config.to_dict().items() if value is not None and key not in _WHERE}
    return json.loads(json.dumps(settings, default=sorted))  # sets


def add_adapter(model: PreTrainedModel, *, settings: Mapping[str, Any]) -> PeftModel:
    """Puts an adapter with these settings (`adapter_settings`) into a model, in place; it begins at random.

    Raises:
        ValueError: the settings are not those of a LoRA or DoRA adapter.
    """
    source = "The checkpoint's `adapter`"
    return _inject(model, _config_of(settings, model=model, source=source), source=source)


def _config_of(content: object, *, model: PreTrainedModel, source: str) -> LoraConfig:
    hidden_size = int(model.config.get_text_config().hidden_size)
    values = checked_settings(content, largest_rank=hidden_size, source=source)
    return register_layers(MoeLoraConfig(**values), model)


def _inject(model: PreTrainedModel, config: LoraConfig, *, source: str) -> PeftModel:
    try:
        peft_model = get_peft_model(model, config)
    except (ValueError, TypeError, re.error) as error:
        raise ValueError(
            f"'{source}' names parts that the model has not, or settings that PEFT refuses: {one_line(error)}."
        ) from error
    assert isinstance(peft_model, PeftModel)
    return peft_model


def adapter_tensors(peft_model: PeftModel) -> dict[str, Tensor]:
    """The active adapter's tensors by PEFT's stored names; they share memory with the parameters."""
    return get_peft_model_state_dict(peft_model, adapter_name=_active_name(peft_model), save_embedding_layers=False)


def _active_name(peft_model: PeftModel) -> str:
    name = peft_model.active_adapter
    assert isinstance(name, str)
    return name


def _first_difference(expected: dict[str, Tensor], loaded: dict[str, Tensor]) -> str | None:
    for name in sorted(set(expected) | set(loaded)):
        if name not in loaded:
            return f"'{name}' is missing in the file."
        if name not in expected:
            return f"'{name}' is in the file, but the model has no such tensor."
        have, need = tuple(loaded[name].shape), tuple(expected[name].shape)
        if have != need:
            return f"'{name}' has shape {have} in the file, and the model needs {need}."
    return None
