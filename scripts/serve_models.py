"""The models that bench_serve.py measures: the shipped one cut by a real plan, and a stack of Qwen3-30B-A3B's layers.

E experts, n channels of an expert, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_synthetic_checkpoint import QWEN3_30B_A3B, SPREAD
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from lightning_moe.allocation import build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.export.padded import export_padded
from lightning_moe.models.channel_experts import ChannelExperts, DenseRows
from lightning_moe.models.discovery import expert_widths, moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.progress import quiet_transformers
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.records import CalibrationStatistics
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.training.corpora import Corpus
from lightning_moe.training.data import TextDataModule

SHIPPED = "asset:small_moe"
VARIANTS = ("dense", "padded", "ragged", "ragged, NF4")
CORPORA = ("speeches", "glosses", "code", "math", "manual")
WIDTH, NUM_EXPERTS, HIDDEN = 768, 128, 2048
VOCABULARY = 4096  # the head of 151,936 would hide four layers behind it


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a plan treats experts of different popularity.

    Args:
        logit_E: log of an expert's share of the routed pairs.
        kept_E: share of its channels that stays.
    """

    logit_E: Tensor
    kept_E: Tensor

    def widths(self, *, prune_ratio: float, align: int, minimum: int) -> tuple[int, ...]:
        """Widths of Qwen3-30B-A3B's experts that keep the wanted share: multiples of `align`; 0 below `minimum`."""
        wanted = (1 - prune_ratio) * WIDTH * len(self.kept_E)

        def shifted(shift: float) -> Tensor:
            multiples = ((self.kept_E + shift) * WIDTH / align).round().int() * align
            return multiples.clamp(0, WIDTH) * (multiples >= minimum)

        shifts = torch.linspace(-1, 1, 2001).tolist()
        best = min(shifts, key=lambda shift: abs(float(shifted(shift).sum()) - wanted))
        return tuple(shifted(best).tolist())


def shipped_statistics() -> CalibrationStatistics:
    """Of the shipped model on 2,560 tokens of each of its five domains."""
    texts = {name: Corpus(source=f"asset:text/{name}/calibration.jsonl", max_tokens=2560) for name in CORPORA}
    data = TextDataModule(tokenizer=SHIPPED, sequence_length=256, calibration_batch_size=2, calibration=texts)
    loaders = data.calibration_dataloaders()
    return collect_statistics(load_model(SHIPPED, dtype="float32"), loaders=loaders, moments=False, progress=False)


def shipped_spread(statistics: CalibrationStatistics, *, prune_ratio: float) -> Spread:
    """Popularity and kept share of the shipped model's 96 experts under our plan, dealt to 128."""
    plan = build_method("exact_global", align=1).plan(statistics, prune_ratio=prune_ratio)
    logits, kept = [], []
    for index, (layer, sums) in enumerate(zip(statistics.shape.layers, statistics.total(), strict=True)):
        count_E = sums["count"].double()
        logits.append((count_E / count_E.sum()).clamp_min(1e-6).log())
        kept.append(torch.tensor(plan.widths(index)) / torch.tensor(layer.widths))
    order = torch.randperm(len(torch.cat(logits)), generator=torch.Generator().manual_seed(0)).repeat(2)[:NUM_EXPERTS]
    return Spread(logit_E=torch.cat(logits)[order], kept_E=torch.cat(kept)[order])


def save_shipped(folder: Path, statistics: CalibrationStatistics, *, prune_ratio: float) -> dict[str, str]:
    """Writes the shipped model cut in the three forms; source of each variant by name."""
    model = load_model(SHIPPED)
    method = build_method("exact_global", expert_floor=16)  # a padded checkpoint needs as many experts in each layer
    apply_plan(model, plan=method.plan(statistics, prune_ratio=prune_ratio))
    with quiet_transformers():
        export_padded(model, folder / "padded")
        save_ragged(model, folder / "ragged")
        quantize_model(model)
        save_ragged(model, folder / "nf4")
    folders = (SHIPPED, *(str(folder / name) for name in ("padded", "ragged", "nf4")))
    return dict(zip(VARIANTS, folders, strict=True))


def stack_config(*, num_layers: int, width: int) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B with few layers, a small vocabulary and experts of `width` channels."""
    shape = QWEN3_30B_A3B | {"num_hidden_layers": num_layers, "vocab_size": VOCABULARY, "moe_intermediate_size": width}
    return Qwen3MoeConfig(**shape, dtype="bfloat16")


@torch.no_grad()
def build_stack(
    variant: str, *, widths: Sequence[int], num_layers: int, device: str, shared: bool = False
) -> PreTrainedModel:
    """A stack of random layers, one layer after the other.

    All experts of a layer are copies of one (values do not change the time) with memory of their own. `shared`: all
    layers use the same experts, so that the forms fit in memory side by side; each has its own router and attention.
    """
    config = stack_config(num_layers=num_layers, width=max(widths) if variant == "padded" else WIDTH)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made: list[nn.Module] = []
    for index, layer in enumerate(moe_layers(model)):
        if not made or not shared:
            made.append(_experts(variant, layer.experts, widths=widths, device=device))
        layer.block.set_submodule("experts", made[-1])
        _fill(model.get_submodule(f"model.layers.{index}"), widths=widths, device=device)
    _fill(model, widths=widths, device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    if variant == "ragged, NF4":
        quantize_model(model)
    return model.requires_grad_(False).eval()


def _experts(variant: str, stock: nn.Module, *, widths: Sequence[int], device: str) -> nn.Module:
    """Experts of one layer: stock ones on the meta device get weights, or ChannelExperts take their place."""
    block_3nH = HIDDEN**-0.5 * torch.randn(3, WIDTH, HIDDEN, generator=torch.Generator().manual_seed(2))
    block_3nH = block_3nH.bfloat16().to(device)
    if variant in ("dense", "padded"):
        width = stock.get_parameter("down_proj").shape[2]
        copies = (NUM_EXPERTS, 1, 1)
        stock.gate_up_proj = nn.Parameter(block_3nH[:2, :width].flatten(0, 1).repeat(copies), requires_grad=False)
        stock.down_proj = nn.Parameter(block_3nH[2, :width].T.contiguous().repeat(copies), requires_grad=False)
        return stock
    index_C = torch.cat([torch.arange(width, device=device) for width in sorted(widths)])
    blocks = iter(
        PackedRows.pack(block_nH) if variant == "ragged, NF4" else DenseRows(block_nH) for block_nH in block_3nH
    )
    return ChannelExperts(
        widths=widths,
        hidden_size=HIDDEN,
        act_fn=stock.get_submodule("act_fn"),
        rows=lambda *_: next(blocks).select(index_C),
    )


def _fill(module: nn.Module, *, widths: Sequence[int], device: str) -> None:
    """Random values for the parameters that are still on the meta device; the router prefers wide experts."""
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        value = torch.ones(parameter.shape, device=device)
        if parameter.dim() > 1:
            value.normal_(0, parameter.shape[-1] ** -0.5)
        if name.endswith("gate.weight"):
            rank_E = torch.tensor(widths).argsort().argsort() / NUM_EXPERTS - 0.5
            value *= (2 * SPREAD * rank_E).exp().to(device)[:, None]
        parent, _, own = name.rpartition(".")
        module.get_submodule(parent).register_parameter(
            own, nn.Parameter(value.to(parameter.dtype), requires_grad=False)
        )


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def routed_share(model: PreTrainedModel, ids_BS: Tensor) -> float:
    """Channels that a routed pair goes through, on average over layers and tokens."""
    means: list[Tensor] = []
    hooks = []
    for layer in moe_layers(model):
        widths_E = torch.tensor(expert_widths(layer.experts), device=ids_BS.device)

        def note(_: nn.Module, arguments: tuple[Tensor, ...], *, widths_E: Tensor = widths_E) -> None:
            means.append(widths_E[arguments[1]].double().mean())

        hooks.append((layer.experts, note))
    handles = [module.register_forward_pre_hook(note) for module, note in hooks]
    model(input_ids=ids_BS, use_cache=False)
    for handle in handles:
        handle.remove()
    return float(torch.stack(means).mean())
