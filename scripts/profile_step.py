"""Where the time of one recovery step goes: on the shipped model, and in one layer of Qwen3-30B-A3B's shape.

    python scripts/profile_step.py [--threads 1] [--rows 12]

The model is cut to 50 %, packed in NF4 and adapted with DoRA (rank 32 on the experts of the large layer); a step is
forward, backward and fused AdamW. Prints milliseconds by part (hooks around modules) and by operator, self time.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoTokenizer, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_moe.adapters.groups import trainable_groups
from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.allocation import build_method
from lightning_moe.assets import asset_path
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan


def main() -> None:
    """Profiles both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--rows", type=int, default=12, help="operators to show (default: 12)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    show("shipped model, 4 x 256 tokens, rank 2", *shipped_step(), rows=arguments.rows)
    show("one layer, 128 experts x 768, hidden 2048, 512 tokens, rank 32", *large_step(), rows=arguments.rows)


def shipped_step() -> tuple[PreTrainedModel, Callable[[], None]]:
    """The quickstart's model and batch size, on the first recovery documents."""
    tokenizer = AutoTokenizer.from_pretrained(asset_path("small_moe"))
    text = asset_path("text/manual/recovery.jsonl").read_text(encoding="utf-8")[:40_000]
    ids = torch.tensor(tokenizer(text)["input_ids"][: 4 * 256]).view(4, 256)
    return recovery_step(load_model("asset:small_moe", dtype="float32"), ids, rank=2)


def large_step() -> tuple[PreTrainedModel, Callable[[], None]]:
    """A model of one layer with random weights; 512 tokens give each of its experts 32 routed pairs on average."""
    return recovery_step(
        Qwen3MoeForCausalLM(large_config(vocab_size=1024)).eval(), torch.randint(1024, (1, 512)), rank=32
    )


def large_config(*, vocab_size: int) -> Qwen3MoeConfig:
    """One decoder layer of Qwen3-30B-A3B's shape."""
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=2048,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        mlp_only_layers=[],
        decoder_sparse_step=1,
    )


def recovery_step(model: PreTrainedModel, ids: Tensor, *, rank: int) -> tuple[PreTrainedModel, Callable[[], None]]:
    """Cuts, packs and adapts the model; returns it with its training step."""
    statistics = collect_statistics(model, loaders={"text": [{"input_ids": ids}]}, progress=False)
    apply_plan(model, plan=build_method("exact_global").plan(statistics, prune_ratio=0.5))
    quantize_model(model)
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=rank, router_rank=2)).train()
    model.enable_input_require_grads()  # as below other adapted layers: backward goes through the first layer too
    parameters = [parameter for group in trainable_groups(model).values() for parameter in group]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        with record_function("part: forward"):
            loss = peft_model(input_ids=ids, labels=ids, use_cache=False).loss
        with record_function("part: backward"):
            loss.backward()
        with record_function("part: optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return model, step


def show(title: str, model: PreTrainedModel, step: Callable[[], None], *, rows: int) -> None:
    """Two steps unseen, one profiled."""
    step()
    step()
    with _named_parts(model), profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = list(profiler.key_averages())
    parts = [event for event in events if event.key.startswith("part: ")]
    operators = sorted(set(events) - set(parts), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    lines = [_line(event.key, event.cpu_time_total, whole, event.count) for event in parts]
    lines += ["", *(_line(event.key, event.self_cpu_time_total, whole, event.count) for event in operators[:rows])]
    sys.stdout.write("\n".join([f"\n## {title}: {whole / 1e3:.0f} ms a step", "", *lines]) + "\n")


def _line(name: str, microseconds: float, whole: float, calls: int) -> str:
    return f"{name[:60]:<60} {microseconds / 1e3:9.1f} ms  {100 * microseconds / whole:5.1f} %  {calls:6d} calls"


@contextmanager
def _named_parts(model: PreTrainedModel) -> Iterator[None]:
    """Names the forward of experts, routers and attention in the profile."""
    handles = []
    for layer in moe_layers(model):
        parts = {"experts": layer.experts, "router": layer.router, "decoder layer": layer.decoder_layer}
        for name, module in parts.items():
            handles += _record(module, f"part: {name}, forward")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record(module: nn.Module, name: str) -> list[torch.utils.hooks.RemovableHandle]:
    ranges: list[record_function] = []

    def start(*_: object) -> None:
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    def stop(*_: object) -> None:
        ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]


if __name__ == "__main__":
    main()
