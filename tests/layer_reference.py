"""One real decoder layer that can be run again with other experts: the independent reference of the statistics.

T tokens, K experts per token, E experts, n channels of an expert, H hidden, S routed pairs of one expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lightning_moe.models.discovery import MoeLayer, moe_layers

# (expert, h_Sn) -> h_Sn: what a test does to the channels of an expert before W_down.
Change = Callable[[int, Tensor], Tensor]


@dataclass
class Routed:
    """One expert's share of a batch: its tokens, their gate weights, a, u, h and z."""

    token_S: Tensor
    gate_S: Tensor
    a_Sn: Tensor
    u_Sn: Tensor
    h_Sn: Tensor
    z_SH: Tensor


class RealLayer:
    """The MoE layer `layer_index` of a stock model on one batch, routing held at what the model chose."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Tensor], *, layer_index: int) -> None:
        self.layer: MoeLayer = moe_layers(model)[layer_index]
        seen: dict[str, Any] = {}
        hooks = [
            self.layer.decoder_layer.register_forward_pre_hook(
                lambda _, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
            ),
            self.layer.decoder_layer.register_forward_hook(lambda _, args, out: seen.update(output=out)),
            self.layer.experts.register_forward_pre_hook(lambda _, args: seen.update(experts_args=args)),
        ]
        with torch.no_grad():
            model.get_decoder()(**inputs, use_cache=False)
        for hook in hooks:
            hook.remove()
        self.args, self.kwargs = seen["args"], seen["kwargs"]
        self.hidden_TH, self.index_TK, self.weights_TK = seen["experts_args"]
        self.output_TH = _flat(seen["output"])
        self.inverse_T = 1 / (self.output_TH.square().sum(-1) + 1e-6)

    def routed(self, *, change_hidden: Change | None = None) -> list[Routed]:
        """Every expert on its tokens, written out with the stock parameters."""
        gate_up, down = self.layer.experts.gate_up_proj, self.layer.experts.down_proj
        found = []
        for expert in range(len(down)):
            token_S, slot_S = torch.where(self.index_TK == expert)
            a_Sn, u_Sn = functional.linear(self.hidden_TH[token_S], gate_up[expert]).chunk(2, dim=-1)
            h_Sn = functional.silu(a_Sn) * u_Sn
            if change_hidden is not None:
                h_Sn = change_hidden(expert, h_Sn)
            z_SH = functional.linear(h_Sn, down[expert])
            gate_S = self.weights_TK[token_S, slot_S].to(z_SH.dtype)
            found.append(Routed(token_S=token_S, gate_S=gate_S, a_Sn=a_Sn, u_Sn=u_Sn, h_Sn=h_Sn, z_SH=z_SH))
        return found

    def run(self, *, factor_E: Tensor, change_hidden: Change | None = None) -> Tensor:
        """Output `[T, H]` of the whole decoder layer with each expert's output times its factor, gates held."""
        total_TH = torch.zeros_like(self.hidden_TH)
        for expert, one in enumerate(self.routed(change_hidden=change_hidden)):
            total_TH = total_TH.index_add(0, one.token_S, factor_E[expert] * one.gate_S.unsqueeze(1) * one.z_SH)
        self.layer.experts.forward = lambda *args: total_TH
        try:
            return _flat(self.layer.decoder_layer(*self.args, **self.kwargs))
        finally:
            del self.layer.experts.forward

    def loss(self, output_TH: Tensor) -> Tensor:
        """Relative squared error of the layer's output against the true one, summed over tokens."""
        return ((output_TH - self.output_TH).square().sum(-1) * self.inverse_T).sum()


class NoSharedExperts(nn.Module):
    """In place of a block's shared experts: a family's router without them."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


def _flat(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    return hidden.reshape(-1, hidden.shape[-1])
