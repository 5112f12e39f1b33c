"""Going through a folder layer by layer, compared with the whole model."""

import torch
from tiny_models import random_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.models.folders import LayerFolder


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, all buffers, and what a state dict says."""
    return dict(module.named_parameters()) | dict(module.named_buffers()) | module.state_dict()


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    own, other = tensors_of(found), tensors_of(expected)
    assert own.keys() == other.keys()
    for name, value in other.items():
        assert own[name].dtype == value.dtype, name
        assert torch.equal(own[name], value), name
        assert own[name].requires_grad == value.requires_grad, name


def loaded(folder: LayerFolder) -> list[str]:
    return [name for name, tensor in folder.model.state_dict().items() if not tensor.is_meta]


def walk_and_compare(folder: LayerFolder, expected: PreTrainedModel) -> None:
    """Each decoder layer alone, given back after; then the rest, and the whole model's logits."""
    assert folder.decoder_names == [f"model.layers.{index}" for index in range(expected.config.num_hidden_layers)]
    for name in folder.decoder_names:
        folder.load_decoder(name)
        assert all(own.startswith(f"{name}.") for own in loaded(folder))
        assert_equal(folder.model.get_submodule(name), expected.get_submodule(name))
        assert folder.decoder_bytes(name) == sum(
            tensor.nbytes for tensor in expected.get_submodule(name).state_dict().values()
        )
        folder.release(name)
        assert loaded(folder) == []
    for name in reversed(folder.decoder_names):
        folder.load_decoder(name)
    found = folder.finish()
    assert_equal(found, expected)
    with torch.no_grad():
        assert torch.equal(found(random_tokens()).logits, expected(random_tokens()).logits)
