"""What a decoder layer keeps for backward outside its routed experts, counted on tensors without data.

T tokens, H hidden, K experts per token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_moe.models.discovery import decoder_names, moe_layers

_ATTENTION = "lightning_moe_counted"


class _FusedAttention(torch.autograd.Function):
    """What kernels that never hold all scores keep: queries, keys, values, output, and a logarithm per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Any:
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None  # pyright: ignore


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)


class _NoExperts(nn.Module):
    """Takes the place of routed experts and keeps nothing."""

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return hidden_TH + 0 * weights_TK.sum().to(hidden_TH.dtype)


def layer_activations(model: PreTrainedModel, *, batch_size: int, sequence_length: int) -> int:
    """Bytes that the last decoder layer, and the norm after it, keep of a batch; routed experts are left out.

    The model is run on tensors without data (fake ones of PyTorch) under hooks that see every tensor that is saved,
    with all other layers left out and attention as a fused kernel has it.

    Args:
        model: On the meta device; it is of no use afterwards.
        batch_size: Sequences.
        sequence_length: Tokens of each.
    """
    last = moe_layers(model)[-1]
    model.set_submodule(last.name, _NoExperts())
    for name in decoder_names(model):
        layer = model.get_submodule(name)
        if layer is not last.decoder_layer:
            layer.forward = lambda hidden, *_, **__: hidden
    model.set_attn_implementation(_ATTENTION)
    model.train()
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in fixed:
            saved[storage._cdata] = storage  # held, so that no other one gets its address
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):  # the parameters, which are on the meta device
        model.to_empty(device="cpu")
        fixed = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        hidden = int(model.config.get_text_config().hidden_size)
        embedded = torch.empty(batch_size, sequence_length, hidden, dtype=model.dtype, requires_grad=True)
        whole = torch.empty(batch_size, 1, 1, 1)  # a mask of four dimensions is taken as it is
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.get_decoder()(inputs_embeds=embedded, attention_mask=whole, use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())
