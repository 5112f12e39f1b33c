"""What the bench_*.py scripts share: timing side by side in one process, peak memory, table and JSON."""

import argparse
import importlib.metadata
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lightning_moe.files import write_json
from lightning_moe.reporting.table import Column, format_markdown

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line of a benchmark says.

    Args:
        json: file for the ratios; none is written when not given.
        quick: at most 50 seconds: fewer repeats, smaller where it must be.
        threads: threads of PyTorch.
    """

    json: Path | None
    quick: bool
    threads: int


def parse_settings(description: str) -> Settings:
    """Reads `--json FILE --quick --threads N` and fixes the threads and the seed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the ratios and the environment to this file")
    parser.add_argument("--quick", action="store_true", help="at most 50 seconds: smaller sizes, fewer repeats")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    settings = Settings(**vars(parser.parse_args()))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    return settings


def interleaved_seconds(functions: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median seconds of each function: one warm-up, then `repeats` rounds in which each runs once, in turning order."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for index in range(repeats):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of tensors that a call of `function` holds at once, beyond those that were there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def in_child(function: Callable[..., Any], **arguments: Any) -> Any:
    """The result of a function of these scripts in a fresh process with as many threads as this one."""
    spawn, threads = multiprocessing.get_context("spawn"), (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=torch.set_num_threads, initargs=threads) as pool:
        return pool.submit(function, **arguments).result()


def peak_rss() -> int:
    """Most bytes that this process had in memory so far, interpreter, libraries and mapped files included.

    Not `getrusage`: that one also counts what the parent held when it started this process.
    """
    return _status_bytes("VmHWM")


def current_rss() -> int:
    """Bytes that this process has in memory now."""
    return _status_bytes("VmRSS")


def forget_peak() -> None:
    """From now on `peak_rss` counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(key))


def report(
    *,
    settings: Settings,
    title: str,
    rows: Sequence[Mapping[str, object]],
    ratios: Mapping[str, float],
    notes: Sequence[str] = (),
) -> None:
    """Prints the table (its columns are the keys of a row), ratios and environment; writes all as JSON where asked."""
    environment = environment_of(settings)
    columns = [Column(key=key, header=key, left=index == 0) for index, key in enumerate(rows[0])]
    lines = [f"## {title}", "", format_markdown(rows, columns=columns), ""]
    lines += [f"{name:<44} {value:.3f}" for name, value in ratios.items()]
    lines += ["", *notes, ", ".join(f"{name} {value}" for name, value in environment.items())]
    sys.stdout.write("\n".join(lines) + "\n")
    if settings.json is not None:
        write_json(settings.json, {"rows": list(rows), "ratios": dict(ratios), "environment": environment})


def environment_of(settings: Settings) -> dict[str, Any]:
    """Machine, threads, versions, and whether this was the quick form."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "command": " ".join(sys.argv),
        "machine": f"{_processor()}, {platform.system()}",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": settings.threads,
        "quick": settings.quick,
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()
