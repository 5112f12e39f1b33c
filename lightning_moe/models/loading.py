"""Load a language model by folder, shipped asset or hub name."""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import lightning_moe.models.deepseek  # noqa: F401  (registers the model type)
from lightning_moe.assets import resolve_asset
from lightning_moe.files import read_shapes
from lightning_moe.models.families import family_of
from lightning_moe.progress import quiet_transformers

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def load_model(source: str, *, dtype: DtypeName = "auto", from_scratch: bool = False) -> PreTrainedModel:
    """A causal language model of a known MoE family, dense, ragged or packed, in eval mode.

    Args:
        source: folder, `asset:small_moe`, or hub name.
        dtype: type of the unpacked weights; `auto` keeps the stored one.
        from_scratch: random weights in the shape of the source's `config.json` (`auto` means float32 then).

    Raises:
        ValueError: the folder does not exist or holds no config, the model's family is not supported, a weight file is
            damaged, or a weight is missing or of another shape.
    """
    path = Path(resolve_asset(source)).expanduser()
    is_folder = _looks_like_a_path(source)
    if is_folder and not (path / "config.json").is_file():
        raise ValueError(f"There is no model at '{source}': no config.json in that folder.")
    location = str(path) if is_folder else source
    try:
        config = AutoConfig.from_pretrained(location)
        family_of(config.get_text_config())
        if from_scratch:
            scratch_dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
            return AutoModelForCausalLM.from_config(config, dtype=scratch_dtype)
        for file in sorted(path.glob("*.safetensors")) if is_folder else []:
            read_shapes(file, what="file of weights")
        return _load_whole(location, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"The model '{source}' cannot be loaded: {error}") from error


def _load_whole(location: str, *, dtype: str | torch.dtype) -> PreTrainedModel:
    """`from_pretrained`, which warns of missing weights and fills them with random numbers: here they are errors."""
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, report = loaded
    missing = _names(report["missing_keys"])
    if missing:
        raise ValueError(
            f"'{location}' lacks {len(missing)} weights of its model, such as {missing[:3]}. Write it again."
        )
    mismatched = _names(key for key, *_ in report["mismatched_keys"])
    if mismatched:
        raise ValueError(
            f"{len(mismatched)} weights of '{location}' have another shape than its config.json says, "
            f"such as {mismatched[:3]}."
        )
    return model


def _names(keys: Any) -> list[str]:
    return sorted(str(key) for key in keys)


def _looks_like_a_path(source: str) -> bool:
    """Whether a source can only mean a local folder (a hub name is `name` or `owner/name`)."""
    return source.startswith((".", "/", "~", "asset:")) or source.count("/") > 1 or Path(source).exists()
