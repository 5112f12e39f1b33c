"""One training step of a pruned, packed layer with DoRA, beside stock PEFT on bitsandbytes' 4-bit Linear layers.

Compared at the layer shape of Qwen3-30B-A3B (hidden 2048, 768 channels cut to multiples of 64, half of them left, rank
32; 128 experts, 14 with --quick) with 32, 128 and 512 routed pairs per expert, in fp32. A step is forward, backward and
`AdamW(fused=True)`, the optimizer being the same for all:

- ours: `DoraExperts` on `ChannelExperts` with NF4 rows;
- PEFT DoRA, PEFT LoRA: one `bitsandbytes.nn.Linear4bit` for each projection and expert (equal weights, NF4 with fp32
  absmax, compute type fp32) under a stock `LoraConfig`, the experts in a loop that gathers and adds with indices, as
  transformers' eager experts are.

Ours multiplies with oneDNN's fp32 kernels, the stock layers with PyTorch's default; "same kernels" is ours without
oneDNN. Before timing, outputs and gradients of the adapters are compared with PEFT DoRA's: they must agree within 1e-4
of each tensor's largest value. Memory is the peak of tensors in a step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmarking import interleaved_seconds, parse_settings, peak_bytes, report
from bitsandbytes.functional import get_4bit_type
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from lightning_moe.adapters.experts import DoraExperts
from lightning_moe.models.channel_experts import ChannelExperts, DenseRows
from lightning_moe.quantization.nf4 import BLOCK_SIZE, pack_experts

HIDDEN, CHANNELS, TOP_K, RANK = 2048, 768, 8, 32
TOKENS = (32, 128, 512)
ACCUMULATION, TOLERANCE, MIB = 4, 1e-4, 2**20
OURS, SAME_KERNELS, PEFT_DORA, PEFT_LORA = "ours", "ours, same kernels", "PEFT DoRA", "PEFT LoRA"
SIDES = ("gate", "up", "down")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class PeftExperts(nn.Module):
    """A gated MLP of three Linear4bit layers per expert under stock PEFT, in a loop over the experts that are hit."""

    def __init__(self, experts: ChannelExperts, *, use_dora: bool) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        mlps = nn.ModuleDict({str(e): _linears(experts, e) for e in range(experts.num_experts)})
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, use_dora=use_dora, target_modules=list(SIDES))
        self.mlps = get_peft_model(mlps, config).base_model.model

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """`hidden [T, H], index [T, K], weights [T, K] -> [T, H]`."""
        output_TH = torch.zeros_like(hidden_TH)
        mask_EKT = functional.one_hot(index_TK, self.num_experts).permute(2, 1, 0)
        for expert in mask_EKT.sum((1, 2)).nonzero().flatten().tolist():
            position_S, token_S = torch.where(mask_EKT[expert])
            mlp, input_SH = self.mlps[str(expert)], hidden_TH[token_S]
            output_SH = mlp["down"](functional.silu(mlp["gate"](input_SH)) * mlp["up"](input_SH))
            output_TH.index_add_(0, token_S, output_SH * weights_TK[token_S, position_S, None])
        return output_TH

    def adapter(self, expert: int, side: str) -> list[nn.Parameter]:
        """A `[r, i]`, B `[o, r]` and, under DoRA, the magnitude `[o]`."""
        linear = self.mlps[str(expert)][side]
        magnitude = [linear.lora_magnitude_vector["default"].weight] if len(linear.lora_magnitude_vector) else []
        return [linear.lora_A["default"].weight, linear.lora_B["default"].weight, *magnitude]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A layer, its optimizer, and what one step of it is."""

    layer: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, layer: nn.Module) -> "Trained":
        """A layer with a new optimizer."""
        parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        return cls(layer=layer, optimizer=torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True))

    @property
    def parameters(self) -> list[Tensor]:
        """The trainable ones."""
        return self.optimizer.param_groups[0]["params"]

    def backward(self, inputs: Inputs) -> Tensor:
        """Forward and backward, with gradients of hidden states and weights as in a model; returns the output."""
        hidden_TH, index_TK, weights_TK, grad_TH = inputs
        hidden_TH, weights_TK = hidden_TH.detach().requires_grad_(), weights_TK.detach().requires_grad_()
        output_TH = self.layer(hidden_TH, index_TK, weights_TK)
        output_TH.backward(grad_TH)
        return output_TH.detach()

    def step(self, inputs: Inputs, *, accumulate: int = 1) -> None:
        """Some micro-batches and the optimizer."""
        for _ in range(accumulate):
            self.backward(inputs)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_bytes(self) -> int:
        """Weights, adapters and two moments of AdamW."""
        tensors = [*self.layer.parameters(), *self.layer.buffers(), *self.parameters, *self.parameters]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


Layers = Mapping[str, Trained]


def main() -> None:
    settings = parse_settings(__doc__ or "")
    layers = build_layers(num_experts=14 if settings.quick else 128)
    repeats = 3 if settings.quick else 5
    difference = largest_difference(layers, routed_inputs(layers, TOKENS[0]))
    if difference > TOLERANCE:
        raise ValueError(f"Outputs or gradients differ from PEFT DoRA's by {difference:.1e} of the largest value.")
    rows = []
    for tokens in TOKENS:
        inputs = routed_inputs(layers, tokens)
        seconds = interleaved_seconds(steps(layers, inputs), repeats=repeats)
        rows.append(row_of(str(tokens), seconds) | memory_of(layers, inputs))
    accumulated = steps(layers, routed_inputs(layers, TOKENS[0]), accumulate=ACCUMULATION)
    seconds = interleaved_seconds(accumulated, repeats=repeats)
    rows.append(row_of(f"{TOKENS[0]}, {ACCUMULATION} micro-batches", seconds))
    report(settings=settings, title=title_of(layers), rows=rows, ratios=ratios_of(rows), notes=notes_of(difference))


def build_layers(*, num_experts: int) -> dict[str, Trained]:
    """The same weights and the same adapters, moved away from their start, three times."""
    experts = _experts(num_experts)
    ours = DoraExperts(experts, "default", LoraConfig(use_dora=True), r=RANK, lora_alpha=2 * RANK)
    with torch.no_grad():
        for name, parameter in ours.adapter_parameters("default").items():
            noise = torch.randn(parameter.shape)
            parameter.mul_(1 + 0.05 * noise) if "magnitude" in name else parameter.add_(0.01 * noise)
    layers: dict[str, nn.Module] = {OURS: ours}
    for name, use_dora in ((PEFT_DORA, True), (PEFT_LORA, False)):
        layers[name] = PeftExperts(experts, use_dora=use_dora)
        for expert, side, parts in _parts(ours, gradients=False):
            for target, source in zip(layers[name].adapter(expert, side), parts, strict=False):
                target.data.copy_(source)
    return {name: Trained.of(layer.train()) for name, layer in layers.items()}


def routed_inputs(layers: Layers, tokens_per_expert: int) -> Inputs:
    """Hidden states, indices in which every expert has the same number of tokens, weights, and a gradient."""
    num_experts = layers[OURS].layer.experts.num_experts
    num_tokens = tokens_per_expert * num_experts // TOP_K
    index_TK = torch.arange(num_tokens * TOP_K).remainder(num_experts).view(num_tokens, TOP_K)
    index_TK = torch.randperm(num_experts)[index_TK[torch.randperm(num_tokens)]]
    weights_TK = torch.rand(num_tokens, TOP_K).softmax(-1)
    return torch.randn(num_tokens, HIDDEN), index_TK, weights_TK, torch.randn(num_tokens, HIDDEN)


def steps(layers: Layers, inputs: Inputs, *, accumulate: int = 1) -> dict[str, Callable[[], object]]:
    """What is timed."""

    def without_onednn() -> None:
        with torch.backends.mkldnn.flags(enabled=False):
            layers[OURS].step(inputs, accumulate=accumulate)

    functions = {name: partial(trained.step, inputs, accumulate=accumulate) for name, trained in layers.items()}
    return {**functions, SAME_KERNELS: without_onednn}


def largest_difference(layers: Layers, inputs: Inputs) -> float:
    """Of outputs and adapter gradients of ours and of PEFT DoRA, relative to the largest value of each tensor."""
    ours, theirs = layers[OURS], layers[PEFT_DORA]
    differences = [_difference(ours.backward(inputs), theirs.backward(inputs))]
    for expert, side, parts in _parts(ours.layer, gradients=True):
        for mine, parameter in zip(parts, theirs.layer.adapter(expert, side), strict=True):
            differences.append(_difference(mine, parameter.grad))
    for trained in (ours, theirs):
        trained.optimizer.zero_grad()
    return max(differences)


def row_of(name: str, seconds: Mapping[str, float]) -> dict[str, object]:
    """Medians and their ratios."""
    row: dict[str, object] = {"pairs per expert": name}
    row |= {f"{method}, ms": round(1e3 * value, 1) for method, value in seconds.items()}
    for method in (OURS, SAME_KERNELS):
        row |= {f"{method} / {other}": round(seconds[method] / seconds[other], 3) for other in (PEFT_DORA, PEFT_LORA)}
    return row


def memory_of(layers: Layers, inputs: Inputs) -> dict[str, object]:
    """Peaks of one step of ours and of PEFT DoRA: beyond what is held before it, and with everything."""
    ours, theirs = layers[OURS], layers[PEFT_DORA]
    steps_MiB = [peak_bytes(partial(trained.step, inputs)) / MIB for trained in (ours, theirs)]
    totals_MiB = [step + trained.held_bytes() / MIB for step, trained in zip(steps_MiB, (ours, theirs), strict=True)]
    row: dict[str, object] = {}
    for name, (mine, other) in {"step": steps_MiB, "in all": totals_MiB}.items():
        row |= {f"MiB {name}: ours": round(mine), f"MiB {name}: PEFT DoRA": round(other)}
        row |= {f"ratio {name}": round(mine / other, 3)}
    return row


def ratios_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By the names of the JSON; memory is that of the largest step, with everything."""
    by_tokens = {row["pairs per expert"]: row for row in rows}
    ratios = {}
    for mine, suffix in ((OURS, ""), (SAME_KERNELS, "_same_kernels")):
        for name, other in (("dora", PEFT_DORA), ("lora", PEFT_LORA)):
            ratios |= {f"dora_over_peft_{name}{suffix}_{t}": by_tokens[str(t)][f"{mine} / {other}"] for t in TOKENS}
    ratios["dora_memory_over_peft_dora"] = by_tokens[str(TOKENS[-1])]["ratio in all"]
    return ratios | {f"dora_step_memory_over_peft_dora_{t}": by_tokens[str(t)]["ratio step"] for t in TOKENS}


def title_of(layers: Layers) -> str:
    """With the sizes."""
    experts = layers[OURS].layer.experts
    return (
        f"DoRA step: {experts.num_experts} experts, {sum(experts.widths)} of {experts.num_experts * CHANNELS} "
        f"channels, hidden {HIDDEN}, rank {RANK}, fp32"
    )


def notes_of(difference: float) -> list[str]:
    """What the numbers mean."""
    return [
        f"Outputs and gradients agree with PEFT DoRA's: largest difference {difference:.1e} of the largest value.",
        "MiB step: peak of tensors in a step beyond weights, adapters and moments, which are the same in both; its "
        "gradients count, and are the same too. MiB in all: everything. The JSON holds the latter for the most pairs, "
        "where a step needs most. In later micro-batches ours holds its gradients twice for a moment.",
        f"With {ACCUMULATION} micro-batches ours computes the norms once, PEFT DoRA in each.",
        "",
    ]


def _difference(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max()).item()


def _experts(num_experts: int) -> ChannelExperts:
    """Ragged widths, multiples of 64, half of the channels on average; rows that NF4 holds exactly."""
    widths = [64 * (1 + (5 * e) % 11) for e in range(num_experts)]
    rows = lambda count, hidden: DenseRows(_exact_in_nf4(count, hidden))  # noqa: E731
    experts = ChannelExperts(widths=widths, hidden_size=HIDDEN, act_fn=nn.SiLU(), rows=rows)
    pack_experts(experts)
    return experts.requires_grad_(requires_grad=False)


def _exact_in_nf4(num_rows: int, num_columns: int) -> Tensor:
    """Random NF4 values of one scale with the largest in every block, whether blocks run along rows or columns."""
    levels = get_4bit_type("nf4", device="cpu")
    weight = levels[torch.randint(len(levels), (num_rows, num_columns))]
    weight[torch.eye(BLOCK_SIZE, dtype=torch.bool).repeat(num_rows // BLOCK_SIZE, num_columns // BLOCK_SIZE)] = 1
    return weight * HIDDEN**-0.5


def _linears(experts: ChannelExperts, expert: int) -> nn.ModuleDict:
    gate_nH, up_nH, down_nH = experts.expert_matrices(expert, dtype=torch.float32)
    return nn.ModuleDict({"gate": _linear(gate_nH), "up": _linear(up_nH), "down": _linear(down_nH.T.contiguous())})


def _linear(weight_oi: Tensor) -> Linear4bit:
    outputs, inputs = weight_oi.shape
    linear = Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4"
    )
    linear.weight = Params4bit(weight_oi, requires_grad=False, compress_statistics=False, quant_type="nf4")
    linear.support_avx512bf16_for_cpu = False  # otherwise eval repacks the weight in place
    return linear.to("cpu")


def _parts(layer: DoraExperts, *, gradients: bool) -> Iterator[tuple[int, str, list[Tensor]]]:
    """A `[r, i]`, B `[o, r]` and magnitude `[o]` of each expert and projection, or their gradients."""
    stacked = {name: p.grad if gradients else p.detach() for name, p in layer.adapter_parameters("default").items()}
    for expert in range(layer.experts.num_experts):
        slot, rows = layer.experts.slot_order.index(expert), slice(*layer.experts.row_range(expert))
        for side in SIDES:
            A, B, m = (stacked[f"lora_{kind}_{side}"] for kind in ("A", "B", "magnitude"))
            yield expert, side, [A[rows].T, B[slot], m[slot]] if side == "down" else [A[slot], B[rows], m[rows]]


if __name__ == "__main__":
    main()
