"""Pruned experts against the stock experts of the unpruned layer, forward without gradients.

Layers of Qwen3-30B-A3B (128 experts of 768 channels, hidden 2048, top 8) and of Qwen1.5-MoE-A2.7B (60 of 1408, hidden
2048, top 4) with half of the channels kept in widths that are multiples of 64: experts that get more tokens keep more,
a few keep all, a few almost nothing. Routing is skewed in the same way. 1, 16, 512 and 4096 tokens.

Ours is `ChannelExperts`. Stock is transformers' own experts module with the fastest of its implementations (eager,
grouped_mm; for one token and dense weights also batched_mm), found anew for each row. In NF4 stock holds its fused 3-D
parameters in 4 bit as bitsandbytes does it (`replace_parameter_4bit`), and both compute in the type that the row names.

`over_share` is (ours / stock) / active share, where the active share is the channels that the routed pairs go through,
divided by the same for the unpruned layer: 1.0 is a forward that costs what is left and nothing else. The JSON holds
the worse of the two layers in bf16, which is what stock is fastest in. `same_kernels` is ours / stock with oneDNN's
fp32 products turned off, which stock does not use. `over_dense_stock` is ours over stock that is not in 4 bit.

`--quick` leaves the fp32 rows out and repeats less, at the same shapes; NF4 stock then runs with the implementation
that was best in bf16.

T tokens, K experts per token, E experts, C channels, n of one expert, H hidden.
"""

import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from benchmarking import Settings, interleaved_seconds, parse_settings, peak_bytes, report
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_moe.models.channel_experts import ChannelExperts, DenseRows
from lightning_moe.quantization.nf4 import PackedRows

TOKENS = (1, 16, 512, 4096)
ALIGN = 64
STOCK_IMPLEMENTATIONS = ("grouped_mm", "eager")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer's shape and its stock experts."""

    name: str
    config: PreTrainedConfig
    experts: type[nn.Module]
    num_experts: int
    width: int
    top_k: int
    hidden: int = 2048


@dataclass(frozen=True, kw_only=True)
class Case:
    """Pruned widths, and the log of how likely each expert is for a token: `[E]`."""

    layer: Layer
    widths: tuple[int, ...]
    logit_E: Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`calls` forwards of equally many tokens each: `(hidden_TH, index_TK, weights_TK)`."""

    num_tokens: int
    calls: tuple[tuple[Tensor, Tensor, Tensor], ...]
    active_share: float

    def run(self, experts: nn.Module) -> None:
        """Every call, one after the other."""
        for call in self.calls:
            experts(*call)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Stock experts and ours, both dense or both in NF4."""

    layer: Layer
    storage: str
    stock: nn.Module
    ours: ChannelExperts


def main() -> None:
    """Runs the benchmark and reports."""
    settings = parse_settings(__doc__ or "")
    warnings.filterwarnings("ignore", message="TF32 acceleration")  # what turning oneDNN off says
    dtypes = (torch.bfloat16,) if settings.quick else (torch.bfloat16, torch.float32)
    rows: list[dict[str, object]] = []
    notes: list[str] = []
    with torch.no_grad():
        for layer, dtype in itertools.product(layers(), dtypes):
            case = pruned_case(layer)
            dense, packed = dense_pair(case, dtype), packed_pair(case, dtype)
            for num_tokens in TOKENS:
                batch = batch_of(case, num_tokens, dtype, quick=settings.quick)
                rows += measure(dense, packed, batch, settings)
            notes.append(memory_note(case, (dense, packed), dtype))
    report(settings=settings, title="Pruned forward", rows=rows, ratios=ratios_of(rows), notes=[*notes, ""])


def layers() -> tuple[Layer, Layer]:
    """The two layers; a config knows only what its experts module reads."""
    qwen3 = {"num_experts": 128, "moe_intermediate_size": 768, "hidden_size": 2048}
    qwen1 = {"num_experts": 60, "moe_intermediate_size": 1408, "hidden_size": 2048}
    return (
        Layer(name="30B", config=Qwen3MoeConfig(**qwen3), experts=Qwen3MoeExperts, num_experts=128, width=768, top_k=8),
        Layer(
            name="A2.7B", config=Qwen2MoeConfig(**qwen1), experts=Qwen2MoeExperts, num_experts=60, width=1408, top_k=4
        ),
    )


def pruned_case(layer: Layer) -> Case:
    """Half of the channels, given to popular experts above all, as a global ranking does."""
    generator = torch.Generator().manual_seed(0)
    logit_E = 0.7 * torch.randn(layer.num_experts, generator=generator)
    wish_E = 2.5 * (logit_E + 0.7 * torch.randn(layer.num_experts, generator=generator))

    def widths(shift: float) -> Tensor:
        return ((wish_E + shift).sigmoid() * layer.width / ALIGN).round().clamp_min(1).int() * ALIGN

    half = layer.num_experts * layer.width / 2
    best = min(torch.linspace(-2, 2, 400).tolist(), key=lambda shift: abs(float(widths(shift).sum()) - half))
    return Case(layer=layer, widths=tuple(widths(best).tolist()), logit_E=logit_E)


def batch_of(case: Case, num_tokens: int, dtype: torch.dtype, *, quick: bool = False) -> Batch:
    """Tokens that each draw K experts by their likelihood, without replacement.

    A batch of one token is several of them, one after the other: one alone would not stand for the rest.
    """
    generator = torch.Generator().manual_seed(1)
    layer, calls, widths = case.layer, [], []
    for _ in range((2 if quick else 4) if num_tokens == 1 else 1):
        noise_TE = -torch.rand(num_tokens, layer.num_experts, generator=generator).log().neg().log()
        index_TK = (case.logit_E + noise_TE).topk(layer.top_k).indices
        weights_TK = torch.rand(num_tokens, layer.top_k, generator=generator).softmax(-1).to(dtype)
        hidden_TH = torch.randn(num_tokens, layer.hidden, generator=generator).to(dtype)
        calls.append((hidden_TH, index_TK, weights_TK))
        widths.append(torch.tensor(case.widths)[index_TK].double().mean())
    share = float(torch.stack(widths).mean()) / layer.width
    return Batch(num_tokens=num_tokens, calls=tuple(calls), active_share=share)


def random_expert(layer: Layer, dtype: torch.dtype) -> Tensor:
    """Gate, up and down of the one expert that all are copies of: `[3, n, H]` (values do not change the time)."""
    generator = torch.Generator().manual_seed(2)
    return (0.02 * torch.randn(3, layer.width, layer.hidden, generator=generator)).to(dtype)


def dense_pair(case: Case, dtype: torch.dtype) -> Pair:
    """Both with weights in `dtype`."""
    layer, block_3nH = case.layer, random_expert(case.layer, dtype)
    with torch.device("meta"):
        stock = layer.experts(layer.config)
    copies = (layer.num_experts, 1, 1)
    stock.gate_up_proj = nn.Parameter(block_3nH[:2].flatten(0, 1).repeat(copies))
    stock.down_proj = nn.Parameter(block_3nH[2].T.contiguous().repeat(copies))
    blocks = iter(block_3nH)
    ours = our_experts(case, lambda index_C: DenseRows(next(blocks).index_select(0, index_C)))
    return Pair(layer=layer, storage=str(dtype).removeprefix("torch."), stock=stock, ours=ours)


def packed_pair(case: Case, dtype: torch.dtype) -> Pair:
    """Both in NF4, computing in `dtype`."""
    layer, block_3nH = case.layer, random_expert(case.layer, dtype)
    with torch.device("meta"):
        stock = layer.experts(layer.config)
    pack_stock(stock, "gate_up_proj", block_3nH[:2].flatten(0, 1), num_experts=layer.num_experts)
    pack_stock(stock, "down_proj", block_3nH[2].T.contiguous(), num_experts=layer.num_experts)
    blocks = iter(block_3nH)
    ours = our_experts(case, lambda index_C: PackedRows.pack(next(blocks)).select(index_C))
    return Pair(layer=layer, storage=f"nf4, {str(dtype).removeprefix('torch.')}", stock=stock, ours=ours)


def pack_stock(experts: nn.Module, name: str, weight_oi: Tensor, *, num_experts: int) -> None:
    """`replace_parameter_4bit` of E copies of a matrix that is quantised once: 14 s less."""
    codes, state = quantize_4bit(weight_oi, quant_type="nf4")
    assert isinstance(state, QuantState)
    state.absmax, state.shape = state.absmax.repeat(num_experts), torch.Size((num_experts, *weight_oi.shape))
    setattr(experts, name, nn.Parameter(codes.repeat(num_experts, 1), requires_grad=False))
    replace_parameter_4bit_prequantized(experts, name, state.as_dict(), torch.device("cpu"))


def our_experts(case: Case, rows: Callable[[Tensor], nn.Module]) -> ChannelExperts:
    """Each expert keeps the first channels of the one block."""
    index_C = torch.cat([torch.arange(width) for width in sorted(case.widths)])
    return ChannelExperts(
        widths=case.widths, hidden_size=case.layer.hidden, act_fn=nn.SiLU(), rows=lambda *_: rows(index_C)
    )


def measure(dense: Pair, packed: Pair, batch: Batch, settings: Settings) -> list[dict[str, object]]:
    """One row for dense and one for NF4."""
    chosen = fastest_stock(dense, batch)
    seconds = time_pair(dense, batch, chosen, repeats=repeats_of(batch, dense, quick=settings.quick))
    rows = [row_of(dense, batch, chosen, seconds, seconds["stock"])]
    chosen = chosen if settings.quick else fastest_stock(packed, batch)
    packed_seconds = time_pair(packed, batch, chosen, repeats=repeats_of(batch, packed, quick=settings.quick))
    return [*rows, row_of(packed, batch, chosen, packed_seconds, seconds["stock"])]


def time_pair(pair: Pair, batch: Batch, implementation: str, *, repeats: int) -> dict[str, float]:
    """Seconds of `stock`, `ours` and, in fp32, ours with the `same` kernels."""
    calls = {"stock": partial(run_stock, pair.stock, batch, implementation), "ours": partial(batch.run, pair.ours)}
    if "float32" in pair.storage:
        calls["same"] = partial(run_same_kernels, pair.ours, batch)
    return interleaved_seconds(calls, repeats=repeats)


def row_of(
    pair: Pair, batch: Batch, implementation: str, seconds: dict[str, float], dense_stock: float
) -> dict[str, object]:
    """The table's row: milliseconds of one call, and ratios."""
    stock, ours, share = seconds["stock"], seconds["ours"], batch.active_share
    return {
        "layer": pair.layer.name,
        "weights": pair.storage,
        "tokens": batch.num_tokens,
        "active_share": f"{share:.3f}",
        "stock": implementation,
        "stock_ms": f"{1e3 * stock / len(batch.calls):.2f}",
        "ours_ms": f"{1e3 * ours / len(batch.calls):.2f}",
        "over_stock": f"{ours / stock:.3f}",
        "over_share": f"{ours / stock / share:.3f}",
        "same_kernels": f"{seconds['same'] / stock:.3f}" if "same" in seconds else "",
        "over_dense_stock": f"{ours / dense_stock:.3f}",
    }


def repeats_of(batch: Batch, pair: Pair, *, quick: bool) -> int:
    """At least five in the full form; in the quick one few where a run takes a second."""
    most = batch.num_tokens == max(TOKENS)
    if not quick:
        return 5 if most or pair.ours.packed else 9
    if pair.ours.packed:
        return 1 if most else 2
    return 2 if most else 9


def fastest_stock(pair: Pair, batch: Batch) -> str:
    """The implementation with the shortest run; there is a run to warm up where runs are short."""
    names = STOCK_IMPLEMENTATIONS
    if batch.num_tokens == 1 and not pair.ours.packed:
        names = (*names, "batched_mm")
    short = batch.num_tokens < max(TOKENS) and not pair.ours.packed
    seconds = {}
    for name in names * (2 if short else 1):
        start = time.perf_counter()
        run_stock(pair.stock, batch, name)
        seconds[name] = time.perf_counter() - start
    return min(seconds, key=lambda name: seconds[name])


def run_stock(stock: nn.Module, batch: Batch, implementation: str) -> None:
    """The stock module with one of its implementations."""
    config = stock.config
    assert isinstance(config, PreTrainedConfig)
    config._experts_implementation = implementation
    batch.run(stock)


def run_same_kernels(ours: ChannelExperts, batch: Batch) -> None:
    """Ours with the fp32 products of stock."""
    with torch.backends.mkldnn.flags(enabled=False):
        batch.run(ours)


def memory_note(case: Case, pairs: tuple[Pair, ...], dtype: torch.dtype) -> str:
    """Peak memory of one forward of 512 tokens beyond the weights."""
    batch, words = batch_of(case, 512, dtype), []
    for pair in pairs:
        ours = peak_bytes(partial(batch.run, pair.ours)) / 2**20
        stock = peak_bytes(partial(run_stock, pair.stock, batch, "grouped_mm")) / 2**20
        words.append(f"{pair.storage} {ours:.0f} MiB, stock {stock:.0f} MiB")
    return f"Peak of one forward of 512 tokens beyond the weights, {case.layer.name}: {'; '.join(words)}"


def ratios_of(rows: list[dict[str, object]]) -> dict[str, float]:
    """The worse of the two layers, in bf16: over the active share, over stock, and NF4 over stock in 16 bit."""
    columns = (
        ("forward_over_active_share_16bit", "bfloat16", "over_share"),
        ("forward_over_active_share_nf4", "nf4, bfloat16", "over_share"),
        ("forward_over_stock_16bit", "bfloat16", "over_stock"),
        ("forward_over_stock_nf4", "nf4, bfloat16", "over_stock"),
        ("forward_nf4_over_stock_16bit", "nf4, bfloat16", "over_dense_stock"),
    )
    ratios = {}
    for name, weights, column in columns:
        for num_tokens in TOKENS:
            values = [row[column] for row in rows if (row["weights"], row["tokens"]) == (weights, num_tokens)]
            ratios[f"{name}_T{num_tokens}"] = max(float(str(value)) for value in values)
    return ratios


if __name__ == "__main__":
    main()
