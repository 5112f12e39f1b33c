"""Serving: tokens a second of prefill and decode, and memory, of a dense model and of its pruned forms.

*dense* is the stock model; *padded* is cut, with zero channels up to the widest expert, in stock code; *ragged* is cut,
in 16 bit; *ragged, NF4* is packed too. *small* is the shipped model, cut by a plan of ours at 50 %. *30B x 4* is four
layers of Qwen3-30B-A3B's shape with random weights and a vocabulary of 4,096, cut at 50 % in the widths of that plan,
scaled up, multiples of 64 from 64 up.

Prefill is one forward pass of prompts that keeps the last logits, as `generate` does; decode is greedy steps with a KV
cache after it. Batch 1, and 8: tokens of all sequences together count. Stock models run the fastest of transformers'
experts implementations for each. Speeds are taken in turns in one process, where the layers of the stack share their
experts' memory. Memory is that of a process of its own for each form, in MB: `weights` the tensors, `loaded` what the
process grew by until they were there, `peak` what it grew by at most while it served the larger batch.

The second table is paper A's question (arXiv 2606.18304, figure 10): what alignment and a minimum width (experts below
it leave) do to speed. Experts of one layer of the 30B shape alone, cut at 25 and 50 % as our plan cuts the shipped
model, each in turns with the dense stock ones, one token and 512; `over_share` is time over dense divided by the share
of the channels that the tokens still go through. On a GPU where there is one.

T tokens, B sequences, S their length, K experts per token, E experts.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench_forward import (
    Batch,
    Case,
    Pair,
    batch_of,
    dense_pair,
    fastest_stock,
    layers,
    our_experts,
    random_expert,
    run_stock,
)
from benchmarking import (
    Settings,
    current_rss,
    environment_of,
    forget_peak,
    in_child,
    interleaved_seconds,
    parse_settings,
    peak_rss,
    report,
)
from serve_models import (
    SHIPPED,
    VARIANTS,
    build_stack,
    routed_share,
    save_shipped,
    shipped_spread,
    shipped_statistics,
    tensor_bytes,
)
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from lightning_moe.files import write_json
from lightning_moe.models.channel_experts import DenseRows
from lightning_moe.models.loading import load_model
from lightning_moe.progress import hidden
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.records import CalibrationStatistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STOCK = ("dense", "padded")
# `batched_mm` copies an expert for each routed pair: tens of GB for a prompt.
IMPLEMENTATIONS = {"prefill": ("grouped_mm", "eager"), "decode": ("grouped_mm", "eager", "batched_mm")}
PRUNE_RATIO = 0.5
PHASES = {"decode": 1, "prefill": 512}  # tokens
ALIGNMENTS, MINIMA, RATIOS = (16, 32, 64, 128), (0, 64, 128), (0.25, 0.5)
_COLUMNS = ("model", "form", "active_share", "weights_MB", "loaded_MB", "peak_MB")
_MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Prompts and answers: `batch` sequences of `prompt` tokens, each answered by `answer` tokens."""

    batch: int
    prompt: int
    answer: int

    def prompts(self) -> Tensor:
        """Random token ids that both vocabularies have, int64 [B, S]."""
        generator = torch.Generator().manual_seed(3)
        return torch.randint(2, 4096, (self.batch, self.prompt), generator=generator).to(DEVICE)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in its four forms.

    Args:
        name: in the table.
        models: builds a form by the name of the variant; `shared` as in `build_stack`.
        traffics: what it serves.
    """

    name: str
    build: Callable[..., PreTrainedModel]
    traffics: tuple[Traffic, ...]


def load_form(variant: str, *, folders: Mapping[str, str], shared: bool = False) -> PreTrainedModel:
    """A form of the shipped model."""
    del shared
    model: Any = load_model(folders[variant])
    return model.to(DEVICE)


def prefill(model: PreTrainedModel, ids_BS: Tensor, *, implementation: str = "grouped_mm") -> DynamicCache:
    """Keys and values of the prompts."""
    use(model, implementation)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finish()
    return cache


def decode(model: PreTrainedModel, cache: DynamicCache, ids_B1: Tensor, *, steps: int, implementation: str) -> None:
    """Greedy steps after the tokens of a cache, which is afterwards what it was."""
    use(model, implementation)
    for _ in range(steps):
        logits = model(input_ids=ids_B1, past_key_values=cache, use_cache=True).logits
        ids_B1 = logits[:, -1:].argmax(-1)
    cache.crop(-steps)
    finish()


def use(model: PreTrainedModel, implementation: str) -> None:
    """Sets the implementation of stock experts; ours have but one."""
    model.config._experts_implementation = implementation


def finish() -> None:
    """Waits for a GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def fastest(run: Callable[..., object], *, variant: str, phase: str) -> str:
    """The implementation that takes the least time for `run(implementation=...)`, each warmed up once."""
    names = IMPLEMENTATIONS[phase]
    if variant not in STOCK:
        return names[0]
    seconds = {}
    for name in names:
        run(implementation=name)
        start = time.perf_counter()
        run(implementation=name)
        seconds[name] = time.perf_counter() - start
    return min(seconds, key=lambda name: seconds[name])


@torch.no_grad()
def speeds(models: Mapping[str, PreTrainedModel], traffic: Traffic, *, repeats: int) -> dict[str, dict[str, Any]]:
    """Per form tokens a second of both phases, and what stock ran them with."""
    ids_BS = traffic.prompts()
    phases: dict[str, dict[str, Callable[..., object]]] = {"prefill": {}, "decode": {}}
    chosen: dict[str, list[str]] = {}
    for name, model in models.items():
        fill = partial(prefill, model, ids_BS)
        steps = partial(decode, model, fill(), ids_BS[:, -1:])
        best_fill = fastest(fill, variant=name, phase="prefill")
        best_step = fastest(partial(steps, steps=4), variant=name, phase="decode")
        phases["prefill"][name] = partial(fill, implementation=best_fill)
        phases["decode"][name] = partial(steps, steps=traffic.answer, implementation=best_step)
        chosen[name] = [best_fill, best_step] if name in STOCK else ["ours"]
    tokens = {"prefill": traffic.batch * traffic.prompt, "decode": traffic.batch * traffic.answer}
    found: dict[str, dict[str, Any]] = {name: {"kernels": "/".join(kinds)} for name, kinds in chosen.items()}
    for phase, functions in phases.items():
        for name, seconds in interleaved_seconds(functions, repeats=repeats).items():
            found[name][phase] = tokens[phase] / seconds
    return found


@torch.no_grad()
def memory_of(*, subject: Subject, variant: str) -> dict[str, int]:
    """Runs in a process of its own; bytes, see the top of the file."""
    traffic = subject.traffics[-1]
    warm = load_form("dense", folders={"dense": SHIPPED})
    serve(warm, replace(traffic, prompt=8))  # what libraries take on first use
    del warm
    before = held()
    model = subject.build(variant)
    loaded, weights = held(), tensor_bytes(model)
    forget_peak()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    serve(model, traffic)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_rss()
    return {"weights": weights, "loaded": loaded - before, "peak": peak - before}


def held() -> int:
    """Bytes of the GPU's tensors, or of the process."""
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else current_rss()


def serve(model: PreTrainedModel, traffic: Traffic) -> None:
    """Answers the prompts once."""
    ids_BS = traffic.prompts()
    cache = prefill(model, ids_BS)
    decode(model, cache, ids_BS[:, -1:], steps=min(traffic.answer, 4), implementation="grouped_mm")


def measure(subject: Subject, settings: Settings) -> list[dict[str, Any]]:
    """One row for each form; memory first, while this process holds little itself."""
    memory = {name: in_child(memory_of, subject=subject, variant=name) for name in VARIANTS}
    models = {name: subject.build(name, shared=True) for name in VARIANTS}
    share = {name: routed_share(model, subject.traffics[0].prompts()) for name, model in models.items()}
    found = [speeds(models, traffic, repeats=1 if settings.quick else 5) for traffic in subject.traffics]
    rows = []
    for name in VARIANTS:
        row: dict[str, Any] = dict.fromkeys(_COLUMNS, "")
        row |= {"model": subject.name, "form": name, "active_share": f"{share[name] / share['dense']:.2f}"}
        row |= {f"{key}_MB": f"{value / _MB:.0f}" for key, value in memory[name].items()}
        for traffic, speed in zip(subject.traffics, found, strict=True):
            row |= {f"{phase}_B{traffic.batch}": f"{speed[name][phase]:.1f}" for phase in ("prefill", "decode")}
            row[f"kernels_B{traffic.batch}"] = speed[name]["kernels"]
        rows.append(row)
    del models
    gc.collect()
    return rows


@torch.no_grad()
def alignment_rows(statistics: CalibrationStatistics, settings: Settings) -> Iterator[dict[str, Any]]:
    """Paper A's figure 10: one row for each cut."""
    layer = layers()[0]
    grid = list(itertools.product(RATIOS, ALIGNMENTS, MINIMA))
    narrow = Case(layer=layer, widths=(64,) * layer.num_experts, logit_E=torch.zeros(layer.num_experts))
    dense = dense_pair(narrow, torch.bfloat16)  # ours in it is not used
    dense.stock.to(DEVICE)
    kernels: dict[str, str] = {}
    for ratio, align, minimum in tqdm(grid[-1:] if settings.quick else grid, disable=hidden(progress=True)):
        spread = shipped_spread(statistics, prune_ratio=ratio)
        widths = spread.widths(prune_ratio=ratio, align=align, minimum=minimum)
        evicted = torch.tensor(widths) == 0
        whole = Case(layer=layer, widths=(layer.width,) * layer.num_experts, logit_E=spread.logit_E.float())
        cut = replace(whole, widths=widths, logit_E=whole.logit_E.masked_fill(evicted, -torch.inf))
        row = {"prune_ratio": ratio, "align": align, "minimum": minimum, "evicted": int(evicted.sum())}
        row |= {"num_widths": len({*widths} - {0}), "kept": f"{sum(widths) / sum(whole.widths):.3f}"}
        kernels = kernels or {
            phase: fastest_stock(dense, on_device(batch_of(whole, tokens, torch.bfloat16)))
            for phase, tokens in PHASES.items()
        }
        yield row | compare_cut(dense, whole, cut, kernels=kernels, repeats=2 if settings.quick else 3)


def compare_cut(dense: Pair, whole: Case, cut: Case, *, kernels: Mapping[str, str], repeats: int) -> dict[str, str]:
    """Time of the cut experts over the stock ones', in both phases and both forms."""
    block_3nH = random_expert(cut.layer, torch.bfloat16)
    found = {}
    forms = {"16bit": DenseRows, "nf4": PackedRows.pack}
    for form, storage in forms.items():
        blocks = iter(block_3nH)
        ours = our_experts(cut, lambda index_C, *, own=blocks, make=storage: make(next(own)).select(index_C)).to(DEVICE)
        for phase, num_tokens in PHASES.items():
            before, after = (on_device(batch_of(case, num_tokens, torch.bfloat16)) for case in (whole, cut))
            runs = {
                "stock": partial(finished, run_stock, dense.stock, before, kernels[phase]),
                "ours": partial(finished, after.run, ours),
            }
            seconds = interleaved_seconds(runs, repeats=repeats)
            ratio = seconds["ours"] / seconds["stock"]
            found |= {f"{phase}_{form}": f"{ratio:.3f}"}
            if form == "16bit":
                found[f"{phase}_over_share"] = f"{ratio / after.active_share:.3f}"
    return found


def finished(run: Callable[..., None], *arguments: Any) -> None:
    """Runs and waits for a GPU."""
    run(*arguments)
    finish()


def on_device(batch: Batch) -> Batch:
    """The same batch where the experts are."""
    calls = tuple((x_TH.to(DEVICE), i_TK.to(DEVICE), w_TK.to(DEVICE)) for x_TH, i_TK, w_TK in batch.calls)
    return replace(batch, calls=calls)


def subjects(folders: Mapping[str, str], widths: Sequence[int], *, quick: bool) -> list[Subject]:
    """The two models."""
    num_layers = 1 if quick else 4
    stack = partial(build_stack, widths=tuple(widths), num_layers=num_layers, device=DEVICE)
    long = 1 if quick else 4
    large = (Traffic(batch=1, prompt=64 * long, answer=4 * long), Traffic(batch=8, prompt=16 * long, answer=2 * long))
    small = (Traffic(batch=1, prompt=128 * long, answer=8 * long), Traffic(batch=8, prompt=64 * long, answer=4 * long))
    return [
        Subject(name="small", build=partial(load_form, folders=folders), traffics=small),
        Subject(name=f"30B x {num_layers}", build=stack, traffics=large),
    ]


def ratios_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Every form's speed and memory over the dense one's."""
    ratios = {}
    for row in rows:
        dense = next(own for own in rows if own["model"] == row["model"])
        if row is dense:
            continue
        for key in ("prefill_B1", "decode_B1", "prefill_B8", "decode_B8", "loaded_MB"):
            ratios[f"{row['model']}, {row['form']}: {key}"] = float(row[key]) / float(dense[key])
    return ratios


def main() -> None:
    """Runs the benchmark, prints both tables and writes the JSON."""
    settings = parse_settings(__doc__ or "")
    silent = replace(settings, json=None)
    measured = shipped_statistics()
    spread = shipped_spread(measured, prune_ratio=PRUNE_RATIO)
    widths = [max(width, 64) for width in spread.widths(prune_ratio=PRUNE_RATIO, align=64, minimum=64)]
    with TemporaryDirectory() as scratch:
        folders = save_shipped(Path(scratch), measured, prune_ratio=PRUNE_RATIO)
        rows = [row for own in subjects(folders, widths, quick=settings.quick) for row in measure(own, settings)]
    ratios = ratios_of(rows)
    notes = [f"{DEVICE}; prefill and decode in tokens a second, all sequences together.", ""]
    report(settings=silent, title="Serving", rows=rows, ratios=ratios, notes=notes)
    cuts = list(alignment_rows(measured, settings))
    notes = ["Time over the dense stock experts, bf16. decode: one token, prefill: 512.", ""]
    report(settings=silent, title="Alignment and minimum width", rows=cuts, ratios={}, notes=notes)
    if settings.json is not None:
        content = {"rows": rows, "ratios": ratios, "alignment": cuts, "environment": environment_of(settings)}
        write_json(settings.json, content)


if __name__ == "__main__":
    main()
