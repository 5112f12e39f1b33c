"""Stock PEFT on one nn.Linear per projection and expert: what DoraExperts is compared with."""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_moe.adapters import DoraExperts
from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts
from lightning_moe.quantization.nf4 import pack_experts

SIDES = ("gate", "up", "down")


def channel_experts(widths: list[int], *, hidden_size: int = 64, packed: bool = False, seed: int = 0) -> ChannelExperts:
    """Frozen experts with random rows."""
    generator = torch.Generator().manual_seed(seed)
    experts = ChannelExperts(widths=widths, hidden_size=hidden_size, act_fn=nn.SiLU())
    for name in PROJECTIONS:
        weight = experts.projection(name).weight
        weight.data = torch.randn(weight.shape, generator=generator) / hidden_size**0.5
    if packed:
        pack_experts(experts)
    return experts.requires_grad_(False)


def adapted(experts: ChannelExperts, *, rank: int = 4, use_dora: bool = True, seed: int = 1) -> DoraExperts:
    """Experts with an adapter that is not the identity: every parameter moved by random numbers."""
    layer = DoraExperts(experts, "default", LoraConfig(use_dora=use_dora), r=rank, lora_alpha=2 * rank)
    shake(layer, seed=seed)
    return layer


def shake(module: nn.Module, *, seed: int = 1, scale: float = 0.1) -> None:
    """Moves every trainable parameter by random numbers."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter)


def routed_input(num_tokens: int, experts: ChannelExperts, *, top_k: int = 2, hit: list[int]) -> tuple[Tensor, ...]:
    """Random hidden states, indices among the experts of `hit` and normalised weights."""
    generator = torch.Generator().manual_seed(7)
    hidden_TH = torch.randn(num_tokens, experts.hidden_size, generator=generator)
    weights_TK, index_TK = torch.rand(num_tokens, len(hit), generator=generator).softmax(-1).topk(top_k, dim=-1)
    return hidden_TH, torch.tensor(hit)[index_TK], weights_TK


class PerExpertLinears(nn.Module):
    """One gated MLP per expert under stock PEFT, with the dequantised weights and the parameters of a DoraExperts."""

    def __init__(self, layer: DoraExperts) -> None:
        super().__init__()
        self.experts = layer.experts
        self.adapter = layer.adapter_parameters("default")
        self.first_row = [self.experts.row_range(e)[0] for e in range(self.experts.num_experts)]
        mlps = {str(e): self._mlp(e) for e, width in enumerate(self.experts.widths) if width}
        config = LoraConfig(
            r=layer.r["default"],
            lora_alpha=layer.lora_alpha["default"],
            use_dora=layer.use_dora["default"],
            target_modules=list(SIDES),
        )
        self.mlps = get_peft_model(nn.ModuleDict(mlps), config).base_model.model
        for (expert, side), linear in self.linears().items():
            for target, source in zip(self.parameters_of(linear), self.sources(expert, side), strict=True):
                target.data.copy_(source)

    def _mlp(self, expert: int) -> nn.ModuleDict:
        mlp = nn.ModuleDict()
        gate_nH, up_nH, down_nH = self.experts.expert_matrices(expert, dtype=torch.float32)
        for side, weight in zip(SIDES, (gate_nH, up_nH, down_nH.T), strict=True):
            mlp[side] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            mlp[side].weight.data = weight.detach().clone()
        return mlp

    def linears(self) -> dict[tuple[int, str], nn.Module]:
        return {(int(e), side): mlp[side] for e, mlp in self.mlps.items() for side in SIDES}

    @staticmethod
    def parameters_of(linear: nn.Module) -> list[nn.Parameter]:
        """A [r, i], B [o, r] and, under DoRA, the magnitude [o]."""
        magnitude = [linear.lora_magnitude_vector["default"].weight] if len(linear.lora_magnitude_vector) else []
        return [linear.lora_A["default"].weight, linear.lora_B["default"].weight, *magnitude]

    def sources(self, expert: int, side: str, *, gradient: bool = False) -> list[Tensor]:
        """The same parameters (or their gradients) cut out of the stacked ones."""
        start, stop = self.experts.row_range(expert)
        slot = self.experts.slot_order.index(expert)
        stacked = {name: value.grad if gradient else value.detach() for name, value in self.adapter.items()}
        per_channel = slice(start, stop)
        A, B = stacked[f"lora_A_{side}"], stacked[f"lora_B_{side}"]
        found = [A[per_channel].T, B[slot]] if side == "down" else [A[slot], B[per_channel]]
        if f"lora_magnitude_{side}" in stacked:
            found.append(stacked[f"lora_magnitude_{side}"][slot if side == "down" else per_channel])
        return found

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        output_TH = torch.zeros_like(hidden_TH)
        for expert, mlp in self.mlps.items():
            token, position = torch.where(index_TK == int(expert))
            inputs = hidden_TH[token]
            output = mlp["down"](nn.functional.silu(mlp["gate"](inputs)) * mlp["up"](inputs))
            output_TH = output_TH.index_add(0, token, output * weights_TK[token, position, None])
        return output_TH
