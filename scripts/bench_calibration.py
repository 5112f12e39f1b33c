"""Calibration against plain forward passes and against paper A's layer-by-layer backward method.

Model: Qwen3-MoE with random weights in the proportions of Qwen3-30B-A3B's layer at 3/8 of its width (hidden 768, 288
channels, top-8), float32, vocabulary 4,096. It has 32 of the 128 experts, so that a short text gives an expert as many
tokens as four times as much gives one of the real model. All layers share one set of expert weights (85 MB, more than
any cache), router, attention and norms are each layer's own. The second half of the channels resembles the first, only
weaker, so that the repair has something to repair.

Compared in one process on the same tokens, forward and calibration in turning order, the rest right after them:
- forward: the stock decoder (no language-model head, which calibration does not run) without gradients, with the faster
  of transformers' `eager` and `grouped_mm` experts. `batched_mm` copies an expert's weights for every routed pair and
  does not fit.
- calibration: `collect_statistics`, everything included (moments, squared weight norms, checks). Once as it is, once
  with oneDNN's fp32 products turned off, so that both sides run on the same kernels.
- paper A: for each layer a partial forward up to it, a deep copy, all routed experts times alpha = 0.9, relative L2
  loss of the layer's output, backward to expert factors and channels. Kindly: frozen weights, no clipping, fastest
  stock experts. Before it is timed, its numbers are checked against ours.
- with repair: calibration, plan (exact_global, half the channels), second pass for the Gram matrices, least squares.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from benchmarking import interleaved_seconds, parse_settings, peak_bytes, report
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_moe.allocation import build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.surgery.repair import Repair, plan_repair

# B sequences, S tokens of one, T = B*S tokens, K experts per token, E experts, n channels of an expert, H hidden.
HIDDEN, EXPERTS, CHANNELS, TOP_K, VOCABULARY = 768, 32, 288, 8, 4096
DEPTHS = (4, 12, 24)
REPAIR_DEPTH = 12
ALPHA = 0.9

Batch = Mapping[str, Tensor]


def make_model() -> Qwen3MoeForCausalLM:
    """The deepest model; `depth` shortens it."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2 * HIDDEN // 128,
        num_key_value_heads=2,
        head_dim=128,
        moe_intermediate_size=CHANNELS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = Qwen3MoeForCausalLM(config).eval().requires_grad_(requires_grad=False)
    # So that every layer adds a similar share to the residual stream, and the plan cuts experts in all of them.
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    first = model.model.layers[0]
    _make_channels_alike(first.mlp.experts)
    experts = {id(parameter): parameter for parameter in first.mlp.experts.parameters()}
    for index in range(1, max(DEPTHS)):
        layer = copy.deepcopy(first, dict(experts))
        layer.self_attn.layer_idx = index
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 2 and "experts" not in name:
                nn.init.normal_(parameter, std=config.initializer_range)
        model.model.layers.append(layer)
    return model


def _make_channels_alike(experts: nn.Module) -> None:
    for part in experts.get_parameter("gate_up_proj").data.chunk(2, dim=1):
        first, second = part.chunk(2, dim=1)
        second.copy_(0.7 * first + 0.1 * second)


@contextmanager
def depth(model: Qwen3MoeForCausalLM, num_layers: int) -> Iterator[None]:
    """The model with its first layers only."""
    layers = model.model.layers
    model.model.layers, model.config.num_hidden_layers = layers[:num_layers], num_layers
    try:
        yield
    finally:
        model.model.layers = layers


@torch.no_grad()
def forward(model: Qwen3MoeForCausalLM, batch: Batch, *, experts: str) -> None:
    """The stock decoder."""
    model.set_experts_implementation(experts)
    model.model(**batch, use_cache=False)


@torch.no_grad()
def forward_with_head(model: Qwen3MoeForCausalLM, batch: Batch, *, experts: str) -> None:
    """The stock decoder and its head."""
    model.set_experts_implementation(experts)
    model(**batch, use_cache=False)


def calibrate(model: Qwen3MoeForCausalLM, batch: Batch) -> tuple[Mapping[str, Tensor], ...]:
    """Ours: every statistic of every layer."""
    return collect_statistics(model, loaders={"text": [batch]}, progress=False).total()


def calibrate_same_kernels(model: Qwen3MoeForCausalLM, batch: Batch) -> None:
    """Ours on torch.mm."""
    with warnings.catch_warnings():
        # The flags touch a setting for Intel's GPUs, and it says that there is none.
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False):
            calibrate(model, batch)


def calibrate_and_repair(model: Qwen3MoeForCausalLM, batch: Batch) -> Repair:
    """Everything that happens before the cut."""
    loaders = {"text": [batch]}
    sums = collect_statistics(model, loaders=loaders, progress=False)
    plan = build_method("exact_global").plan(sums, prune_ratio=0.5)
    return plan_repair(model, plan=plan, loaders=loaders, progress=False)


class _Reached(Exception):  # noqa: N818
    """Ends a partial forward."""


def paper_a(model: Qwen3MoeForCausalLM, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Layer loss, attribution `[E]` and channel saliency `[E * n]` of every layer, by backward passes."""
    return [_backward_layer(layer, *_layer_inputs(model, layer, batch)) for layer in model.model.layers]


def _layer_inputs(model: Qwen3MoeForCausalLM, layer: nn.Module, batch: Batch) -> tuple[tuple, dict]:
    found: list[tuple[tuple, dict]] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append((args, kwargs))
        raise _Reached

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model.model(**batch, use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]


def _backward_layer(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        true_BSH = layer(*args, **kwargs)
    factor_E = torch.ones(EXPERTS, requires_grad=True)
    hidden: list[Tensor] = []
    perturbed = copy.deepcopy(layer)
    experts = perturbed.get_submodule("mlp.experts")
    experts.forward = partial(_perturbed_experts, experts, factor_E=ALPHA * factor_E, hidden=hidden)
    error_BS = (perturbed(*args, **kwargs) - true_BSH).square().sum(-1)
    loss = (error_BS / (true_BSH.square().sum(-1) + 1e-6)).sum()
    gradient_E, *gradients = torch.autograd.grad(loss, [factor_E, *hidden])
    pairs = zip(hidden, gradients, strict=True)
    return loss.detach(), -gradient_E, torch.cat([(h * g).abs().sum(0) for h, g in pairs]).detach()


def _perturbed_experts(
    experts: nn.Module, input_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, *, factor_E: Tensor, hidden: list[Tensor]
) -> Tensor:
    """Stock `eager` experts, with a factor on each expert's output and its channels kept for their gradients."""
    output_TH = torch.zeros_like(input_TH)
    for expert, (gate_up, down) in enumerate(
        zip(experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj"), strict=True)
    ):
        token_S, slot_S = torch.where(index_TK == expert)
        gate_Sn, up_Sn = functional.linear(input_TH[token_S], gate_up).chunk(2, dim=-1)
        hidden.append((functional.silu(gate_Sn) * up_Sn).requires_grad_())
        scale_S1 = factor_E[expert] * weight_TK[token_S, slot_S].unsqueeze(1)
        output_TH = output_TH.index_add(0, token_S, scale_S1 * functional.linear(hidden[-1], down))
    return output_TH


def check_paper_a(model: Qwen3MoeForCausalLM, batch: Batch) -> float:
    """Largest relative difference (L2, per layer and quantity) between paper A's numbers and ours."""
    differences = []
    for sums, (loss, phi_E, saliency_C) in zip(calibrate(model, batch), paper_a(model, batch), strict=True):
        factor = 2 * ALPHA * (1 - ALPHA)
        ours = (
            (1 - ALPHA) ** 2 * sums["layer_energy"],
            factor * sums["attribution"],
            factor * sums["channel_saliency"],
        )
        for mine, theirs in zip(ours, (loss, phi_E, saliency_C), strict=True):
            differences.append(float((mine - theirs).norm() / mine.norm()))
    assert max(differences) < 1e-4, differences
    return max(differences)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured: tokens of the text and for paper A, repeats, and where the extra columns are taken."""

    tokens: int
    reference_tokens: int
    repeats: int
    repair_repeats: int
    reference_repeats: Mapping[int, int]
    extra_depths: tuple[int, ...]


FULL = Plan(
    tokens=2048,
    reference_tokens=256,
    repeats=5,
    repair_repeats=5,
    reference_repeats={4: 5, 12: 3, 24: 1},
    extra_depths=(4, 12, 24),
)
QUICK = Plan(
    tokens=352,
    reference_tokens=64,
    repeats=2,
    repair_repeats=1,
    reference_repeats={4: 1, 12: 1, 24: 1},
    extra_depths=(4,),
)


def random_batch(num_tokens: int) -> Batch:
    """Sequences of at most 512 tokens."""
    length = min(512, num_tokens)
    return {"input_ids": torch.randint(0, VOCABULARY, (num_tokens // length, length))}


def measure_depth(model: Qwen3MoeForCausalLM, plan: Plan, *, num_layers: int, fastest: str) -> dict[str, float]:
    """Median seconds of everything at one depth; `paper A` and `beside it` (ours) on the smaller text."""
    text, small = random_batch(plan.tokens), random_batch(plan.reference_tokens)
    compared: dict[str, Callable[[], object]] = {
        "forward": partial(forward, model, text, experts=fastest),
        "calibration": partial(calibrate, model, text),
    }
    if num_layers in plan.extra_depths:
        compared["same kernels"] = partial(calibrate_same_kernels, model, text)
        compared["with head"] = partial(forward_with_head, model, text, experts=fastest)
    seconds = interleaved_seconds(compared, repeats=plan.repeats)
    if num_layers == REPAIR_DEPTH:
        repair = partial(calibrate_and_repair, model, text)
        seconds["with repair"] = median_seconds(repair, repeats=plan.repair_repeats)
    model.set_experts_implementation(fastest)
    repeats = plan.reference_repeats[num_layers]
    seconds["paper A"] = median_seconds(partial(paper_a, model, small), repeats=repeats)
    seconds["beside it"] = median_seconds(partial(calibrate, model, small), repeats=max(2, repeats))
    if num_layers in plan.extra_depths:
        same_kernels = partial(calibrate_same_kernels, model, small)
        seconds["beside it, same kernels"] = median_seconds(same_kernels, repeats=max(2, repeats))
    return seconds


def median_seconds(function: Callable[[], object], *, repeats: int) -> float:
    """Without a warm-up: for what takes minutes."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def fastest_experts(model: Qwen3MoeForCausalLM, batch: Batch, *, repeats: int) -> tuple[str, str]:
    """The faster of transformers' implementations, and both times as a note."""
    compared = {name: partial(forward, model, batch, experts=name) for name in ("eager", "grouped_mm")}
    seconds = interleaved_seconds(compared, repeats=repeats)
    times = ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in seconds.items())
    return min(seconds, key=lambda name: seconds[name]), f"Plain forward of 4 layers: {times}; the faster is used."


def memory_note(model: Qwen3MoeForCausalLM, batch: Batch, *, fastest: str) -> str:
    """Peak memory of 4 layers, in one layer's routed activations: input, gate, up, hidden and output of every pair."""
    layer_bytes = batch["input_ids"].numel() * TOP_K * (2 * HIDDEN + 3 * CHANNELS) * 4
    plain, ours = (
        peak_bytes(partial(forward, model, batch, experts=fastest)),
        peak_bytes(partial(calibrate, model, batch)),
    )
    return (
        f"Peak memory of tensors: forward {plain / 2**20:.0f} MiB, calibration {ours / 2**20:.0f} MiB, so "
        f"{(ours - plain) / layer_bytes:+.2f} of one layer's routed activations ({layer_bytes / 2**20:.0f} MiB)."
    )


def table(seconds: Mapping[int, Mapping[str, float]]) -> list[dict[str, object]]:
    """One line for each thing that was timed at each depth."""
    against = dict.fromkeys(("paper A", "beside it", "beside it, same kernels"), ("beside it", "ours"))
    rows: list[dict[str, object]] = []
    for num_layers, times in seconds.items():
        for name, value in times.items():
            base, shown = against.get(name, ("forward", "forward"))
            ratio = f"{value / times[base]:.3f} x {shown}"
            rows.append({"what": name, "layers": num_layers, "ms": f"{1e3 * value:.1f}", "ratio": ratio})
    return rows


def ratios(seconds: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """What the JSON holds; `same_kernels`: both sides with PyTorch's default products."""
    repaired = seconds[REPAIR_DEPTH]
    same = {n: times for n, times in seconds.items() if "same kernels" in times}
    over = {f"calibration_over_forward_{n}_layers": t["calibration"] / t["forward"] for n, t in seconds.items()}
    reference = {f"reference_over_ours_{n}_layers": t["paper A"] / t["beside it"] for n, t in seconds.items()}
    for n, t in same.items():
        over[f"calibration_over_forward_same_kernels_{n}_layers"] = t["same kernels"] / t["forward"]
        reference[f"reference_over_ours_same_kernels_{n}_layers"] = t["paper A"] / t["beside it, same kernels"]
    name = f"calibration_with_repair_over_forward_{REPAIR_DEPTH}_layers"
    return over | reference | {name: repaired["with repair"] / repaired["forward"]}


def main() -> None:
    """Measures all depths and reports."""
    settings = parse_settings(__doc__ or "")
    plan = QUICK if settings.quick else FULL
    model, text = make_model(), random_batch(plan.tokens)
    with depth(model, min(DEPTHS)):
        difference = check_paper_a(model, random_batch(plan.reference_tokens))
        fastest, choice = fastest_experts(model, text, repeats=plan.repeats)
        memory = memory_note(model, text, fastest=fastest)
    seconds = {}
    for num_layers in DEPTHS:
        with depth(model, num_layers):
            seconds[num_layers] = measure_depth(model, plan, num_layers=num_layers, fastest=fastest)
    notes = [
        f"{plan.tokens} tokens; paper A and ours beside it {plan.reference_tokens}. Medians of {plan.repeats} in turn, "
        f"after a warm-up; without one, right after them: with repair of {plan.repair_repeats}, paper A of "
        f"{', '.join(f'{count} at {n} layers' for n, count in plan.reference_repeats.items())}.",
        f"{choice} Calibration includes the squared weight norms, taken once however long the text is.",
        f"Paper A's layer loss, attribution and channel saliency equal ours: relative difference {difference:.1e}.",
        memory,
    ]
    report(settings=settings, title="Calibration", rows=table(seconds), ratios=ratios(seconds), notes=notes)


if __name__ == "__main__":
    main()
