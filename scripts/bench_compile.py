"""`torch.compile` against eager on the shipped model: as it is, half of its channels cut, and that in NF4.

In one process and turning order, the default backend, no autograd: prefill of 512 tokens without a cache, and decoding
one token with a static cache of 512. Logits are compared first. Graphs and breaks are what `torch._dynamo.explain`
counts. Compiling itself is not in the times; its seconds are a column.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from benchmarking import interleaved_seconds, parse_settings, report
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from lightning_moe.allocation import build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan

TOKENS = 512


def cut_model() -> PreTrainedModel:
    """Half of the channels, by exact ablation on random tokens: here only the widths matter."""
    model = load_model("asset:small_moe")
    ids = torch.randint(0, model.config.vocab_size, (8, 256))
    statistics = collect_statistics(model, loaders={"random": [{"input_ids": ids}]}, progress=False)
    apply_plan(model, plan=build_method("exact_global", align=16).plan(statistics, prune_ratio=0.5))
    return model


def packed_model() -> PreTrainedModel:
    """The same in 4 bit."""
    model = cut_model()
    quantize_model(model)
    return model


def prefill(forward: Callable[..., object], *, ids: Tensor) -> Tensor:
    """Logits of the whole text."""
    return forward(input_ids=ids, use_cache=False).logits  # pyright: ignore[reportAttributeAccessIssue]


def decode(forward: Callable[..., object], *, ids: Tensor, cache: StaticCache) -> Tensor:
    """Logits of the last token, the others being in the cache."""
    position = torch.tensor([[TOKENS - 1]])
    output = forward(input_ids=ids[:, -1:], position_ids=position, past_key_values=cache, use_cache=True)
    _rewind(cache)
    return output.logits  # pyright: ignore[reportAttributeAccessIssue]


def _rewind(cache: StaticCache) -> None:
    """Back to before the last token, so that each call does the same."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(TOKENS - 1)


def rows_of(name: str, model: PreTrainedModel, *, repeats: int) -> list[dict[str, object]]:
    """Prefill and decode of one model."""
    torch.compiler.reset()
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS))
    explained = torch._dynamo.explain(model)(input_ids=ids, use_cache=False)
    torch.compiler.reset()
    cache, compiled, rows = StaticCache(config=model.config, max_cache_len=TOKENS), torch.compile(model), []
    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    for phase, run in (("prefill", partial(prefill, ids=ids)), ("decode", partial(decode, ids=ids, cache=cache))):
        start, expected = time.perf_counter(), run(model)
        difference = float((run(compiled) - expected).abs().median() / expected.abs().max())
        seconds = time.perf_counter() - start
        assert difference < 0.02, (name, phase, difference)
        medians = interleaved_seconds(
            {"eager": partial(run, model), "compiled": partial(run, compiled)}, repeats=repeats
        )
        rows.append(
            {
                "model": name,
                "phase": phase,
                "eager ms": f"{1e3 * medians['eager']:.2f}",
                "compiled ms": f"{1e3 * medians['compiled']:.2f}",
                "ratio": round(medians["compiled"] / medians["eager"], 3),
                "graphs": explained.graph_count,
                "breaks": explained.graph_break_count,
                "compile s": f"{seconds:.1f}",
            }
        )
    return rows


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    settings = parse_settings(str(__doc__))
    warnings.filterwarnings("ignore", message="Dynamo detected a call")  # in transformers' own code
    models = {"dense": partial(load_model, "asset:small_moe"), "cut 50 %": cut_model, "cut 50 %, NF4": packed_model}
    repeats = 15 if settings.quick else 60
    rows = [row for name, make in models.items() for row in rows_of(name, make(), repeats=repeats)]
    ratios = {f"compiled / eager, {row['model']}, {row['phase']}": float(str(row["ratio"])) for row in rows}
    report(settings=settings, title="torch.compile", rows=rows, ratios=ratios)


if __name__ == "__main__":
    main()
