"""Allocation at Qwen3-30B-A3B's size: seconds, memory, and whether the budget is met exactly.

48 layers of 128 experts of 768 channels (hidden size 2048), random statistics: log-normal numbers, experts of very
different use, all sums that a calibration can keep, the [E, H] and [E, E] ones included. One preset of every kind of
method plans half of the channels away, in a fresh process of its own that reads the statistics from their file, as the
command `plan` does. The budget is asserted: to the block for methods with blocks, to the channel with blocks of one.

`plan_seconds` is the slowest method's median of `.plan(...)` (statistics just opened, their digest for the plan's
provenance included), `plan_peak_gb` the largest peak of a process, interpreter and libraries included. The JSON also
holds `reload_over_read` of `bench_load.py`. The full form repeats more and adds statistics of five corpora.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench_load import measure_reload
from benchmarking import Settings, in_child, parse_settings, peak_bytes, peak_rss, report
from torch import Tensor

from lightning_moe.allocation import ExpertMethod, build_method
from lightning_moe.allocation.budget import channel_budget, resolve_align
from lightning_moe.records import STATISTICS, CalibrationStatistics, LayerShape, ModelShape, PrunePlan
from lightning_moe.records.statistics import WEIGHT_ABS_SUMS, WEIGHT_NORMS

NUM_LAYERS, NUM_EXPERTS, WIDTH, HIDDEN, TOP_K, TOKENS = 48, 128, 768, 2048, 8, 2**18
PRUNE_RATIO, UNEVEN_RATIO = 0.5, 0.37
# Spread of the logarithms: of how often experts are used, and of everything else.
_USE_SPREAD, _SPREAD = 1.2, 1.0
# Presets that share a class differ in the formula of a score.
METHODS = (
    "exact_global",
    "channel_coverage",
    "paper_a",
    "tb_coverage",
    "reap",
    "mone",
    "expert_sparsity",
    "uniform",
    "wanda",
    "snip",
    "loss_proportional",
)
_GB = 1e9


def shape_30b() -> ModelShape:
    """Qwen3-30B-A3B."""
    layers = tuple(
        LayerShape(name=f"model.layers.{index}.mlp.experts", widths=(WIDTH,) * NUM_EXPERTS, top_k=TOP_K)
        for index in range(NUM_LAYERS)
    )
    return ModelShape(model_type="qwen3_moe", hidden_size=HIDDEN, layers=layers, router_digest="")


def random_statistics(shape: ModelShape, *, corpora: Sequence[str]) -> CalibrationStatistics:
    """Log-normal sums, larger for experts that are used more."""
    made = {corpus: tuple(_random_layer(layer) for layer in shape.layers) for corpus in corpora}
    weights = tuple(
        {name: _log_normal((layer.num_channels,)) for name in (*WEIGHT_NORMS, *WEIGHT_ABS_SUMS)}
        for layer in shape.layers
    )
    return CalibrationStatistics(shape=shape, corpora=made, weights=weights)


def _random_layer(layer: LayerShape) -> dict[str, Tensor]:
    use_E = _log_normal((layer.num_experts,), spread=_USE_SPREAD)
    use_C = use_E.repeat_interleave(torch.tensor(layer.widths))
    values = {}
    for name, statistic in STATISTICS.items():
        value = _log_normal(statistic.size(layer, hidden_size=HIDDEN))
        scale = {"C": use_C, "E": use_E}.get(statistic.dims[:1])
        values[name] = value if scale is None else value * scale.view(-1, *[1] * (value.dim() - 1))
    values["num_tokens"] = torch.tensor(float(TOKENS), dtype=torch.float64)
    values["count"] = (use_E / use_E.sum() * TOKENS * TOP_K).round()
    values["attribution"] *= torch.where(torch.rand(layer.num_experts) < 0.1, -1.0, 1.0)
    return values


def _log_normal(size: Sequence[int], *, spread: float = _SPREAD) -> Tensor:
    return torch.empty(tuple(size), dtype=torch.float64).log_normal_(0, spread)


def save_statistics(*, path: str, corpora: Sequence[str]) -> dict[str, float]:
    """Seconds of saving, and bytes."""
    made = random_statistics(shape_30b(), corpora=corpora)
    start = time.perf_counter()
    made.save(path)
    return {"seconds": time.perf_counter() - start, "bytes": Path(path).stat().st_size}


def measure_method(*, name: str, path: str, repeats: int, tensors: bool) -> dict[str, float]:
    """Runs in a fresh process: loads and plans `repeats` times, checks the budgets, counts bytes of `tensors` too."""
    before = peak_rss()
    seconds: dict[str, list[float]] = {"load": [], "plan": []}
    for _ in range(repeats):
        opened, load_seconds = _timed(partial(CalibrationStatistics.load, path))
        plan, plan_seconds = _timed(partial(build_method(name).plan, opened, prune_ratio=PRUNE_RATIO))
        seconds["load"].append(load_seconds)
        seconds["plan"].append(plan_seconds)
    peak = peak_rss()
    check_budget(plan, name=name)
    check_fine_budget(opened, name=name)
    found = {key: statistics.median(values) for key, values in seconds.items()}
    found |= {"before": before, "peak": peak} | _files(plan, folder=Path(path).parent)
    if tensors:
        plan_anew = partial(build_method(name).plan, prune_ratio=PRUNE_RATIO)
        found["tensors"] = peak_bytes(lambda: plan_anew(CalibrationStatistics.load(path)))
    return found


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def _files(plan: PrunePlan, *, folder: Path) -> dict[str, float]:
    """Seconds of what a user waits for after the plan is made."""
    file = folder / "plan.json"
    _, saving = _timed(lambda: plan.save(file))
    loaded, loading = _timed(lambda: PrunePlan.load(file))
    assert loaded.digest == plan.digest
    _, digesting = _timed(lambda: PrunePlan.load(file).digest)
    return {"save_plan": saving, "load_plan": loading, "digest_plan": digesting - loading}


def check_budget(plan: PrunePlan, *, name: str) -> None:
    """The widths that each method documents, counted."""
    align = resolve_align(build_method(name).align, shape=plan.shape)
    widths = [width for index in range(len(plan.shape.layers)) for width in plan.widths(index)]
    expected = channel_budget(plan.shape, prune_ratio=PRUNE_RATIO) // align * align
    if name == "uniform":
        assert set(widths) == {round((1 - PRUNE_RATIO) * WIDTH / align) * align}, name
    elif isinstance(build_method(name), ExpertMethod):
        assert set(widths) == {0, WIDTH}, name
        expected = NUM_LAYERS * round((1 - PRUNE_RATIO) * NUM_EXPERTS) * WIDTH
    assert all(width % align == 0 for width in widths), name
    assert plan.num_kept == sum(widths) == expected, (name, plan.num_kept, expected)


def check_fine_budget(opened: CalibrationStatistics, *, name: str) -> None:
    """With blocks of one channel, an uneven ratio is met to the channel."""
    if name in ("exact_global", "paper_a", "wanda", "snip", "loss_proportional"):
        settings = {"align": 1} | ({"min_width": 1} if name == "paper_a" else {})
        plan = build_method(name, **settings).plan(opened, prune_ratio=UNEVEN_RATIO)
        assert plan.num_kept == channel_budget(opened.shape, prune_ratio=UNEVEN_RATIO), (name, plan.num_kept)


def measure_plans(*, corpora: Sequence[str], quick: bool) -> tuple[list[dict[str, float]], str]:
    """What `measure_method` found for each method, and a line on the file of statistics."""
    with TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "statistics.safetensors")
        saved = save_statistics(path=path, corpora=corpora)
        repeats = 3 if quick else 5
        found = [in_child(measure_method, name=name, path=path, repeats=repeats, tensors=not quick) for name in METHODS]
    of = f"{len(corpora)} {'corpus' if len(corpora) == 1 else 'corpora'}"
    line = f"Statistics of {of}: {saved['bytes'] / _GB:.2f} GB, saved in {saved['seconds']:.2f} s."
    return found, line


def as_row(name: str, found: dict[str, float], *, num_corpora: int) -> dict[str, object]:
    """Seconds and GB of one method."""
    row: dict[str, object] = {"method": name, "corpora": num_corpora}
    row |= {f"{key} s": f"{found[key]:.2f}" for key in ("load", "plan")}
    row |= {"peak GB": f"{found['peak'] / _GB:.2f}", "of it libraries": f"{found['before'] / _GB:.2f}"}
    if "tensors" in found:
        row["tensors GB"] = f"{found['tensors'] / _GB:.2f}"
    return row | {f"{key} s": f"{found[key]:.2f}" for key in ("save_plan", "load_plan", "digest_plan")}


def main(settings: Settings) -> None:
    """Prints the table and writes the JSON."""
    reload_rows, reload_over_read = measure_reload(
        num_layers=4 if settings.quick else 12, repeats=3 if settings.quick else 7
    )
    rows, notes, every = [], [], []
    for corpora in [("text",)] if settings.quick else [("text",), ("code", "math", "news", "prose", "web")]:
        found, line = measure_plans(corpora=corpora, quick=settings.quick)
        rows += [as_row(name, own, num_corpora=len(corpora)) for name, own in zip(METHODS, found, strict=True)]
        every += found
        notes.append(line)
    notes += [f"reload, {row['what']}, {row['way']}: {row['ms']} ms" for row in reload_rows]
    ratios = {
        "plan_seconds": max(own["plan"] for own in every),
        "plan_peak_gb": max(own["peak"] for own in every) / _GB,
        "reload_over_read": reload_over_read,
    }
    report(settings=settings, title="Plans at the size of Qwen3-30B-A3B", rows=rows, ratios=ratios, notes=notes)


if __name__ == "__main__":
    main(parse_settings(__doc__))
