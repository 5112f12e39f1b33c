"""What the original of a model takes as transformers stores it, from its config alone."""

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lightning_moe.models.sources import read_index
from lightning_moe.quantization.stored import StoredTensor, as_stored, file_bytes


def stock_bytes(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype | None = None,
    rest_bytes: int | None = None,
    index: Path | None = None,
) -> int:
    """Bytes of the folder of a dense model: tensors under their published names, `config.json`, generation config.

    Exact for a model in one file, which `save_pretrained` writes below 50 GB, and for one in shards whose index is
    given; cut into shards otherwise, it takes a few KB more.

    Args:
        config: Of any model, uniformly cut stock models included.
        dtype: Type of the weights; the config's own if None, float32 where it names none.
        rest_bytes: Of `generation_config.json`; what transformers makes of the config if None.
        index: `model.safetensors.index.json` of the model's shards; left aside if its names are not the model's.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype or config.dtype or torch.float32)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    if rest_bytes is None:
        rest_bytes = 0 if model.generation_config is None else len(model.generation_config.to_json_string().encode())
    return _tensor_bytes(stock_tensors(model), index=index) + len(model.config.to_json_string().encode()) + rest_bytes


def _tensor_bytes(tensors: Sequence[StoredTensor], *, index: Path | None) -> int:
    """In one file, or in the shards of an index, which counts too."""
    files = {} if index is None else read_index(index)
    if index is None or files.keys() != {tensor.name for tensor in tensors}:
        return file_bytes(tensors)
    shards: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in tensors:
        shards[files[tensor.name]].append(tensor)
    return sum(map(file_bytes, shards.values())) + index.stat().st_size


def stock_tensors(model: PreTrainedModel) -> list[StoredTensor]:
    """The tensors that `save_pretrained` writes of a stock model (of the meta device, say): tied ones once."""
    state = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return [as_stored(name, tensor) for name, tensor in revert_weight_conversion(model, state).items()]
