"""One row of a comparison: a folder on disk, reloaded and evaluated."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_moe.adapters.storage import load_adapter
from lightning_moe.evaluation.perplexity import evaluate_model
from lightning_moe.files import read_json, write_json
from lightning_moe.models.loading import DtypeName, load_model
from lightning_moe.quantization.footprint import measure_footprint

Stage = dict[str, Any]


def model_bytes(folder: str | Path) -> int:
    """Bytes on disk of a model or adapter folder: its tensors and its configs, without tokenizer and documents."""
    folder = Path(folder)
    tensors = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return tensors + sum(file.stat().st_size for file in folder.glob("*config.json") if "tokenizer" not in file.name)


def evaluate_stage(
    name: str,
    *,
    folder: str | Path,
    loaders: Mapping[str, Iterable[Mapping[str, Tensor]]],
    prune_ratio: float,
    seconds: float,
    adapter: str | Path | None = None,
    dtype: DtypeName = "float32",
) -> Stage:
    """Loads a folder (and its adapter), evaluates it, and measures what it takes.

    Args:
        name: name of the row.
        folder: a dense, ragged or packed model.
        loaders: one loader of batches per held-out corpus.
        prune_ratio: the share of routed-expert channels removed.
        seconds: what it took to make the folder.
        adapter: a PEFT adapter of that model, if any.
        dtype: type of the unpacked weights during evaluation.

    Returns:
        A dict of plain types: name, prune_ratio, keep_ratio, nll, nll_per_corpus (nats per token), bytes (on disk),
        stored_params, active_params (measured on the evaluated text), seconds, seconds_evaluation.
    """
    started = time.perf_counter()
    model = load_model(str(folder), dtype=dtype)
    num_bytes = model_bytes(folder)
    if adapter is not None:
        load_adapter(model, folder=adapter)
        num_bytes += model_bytes(adapter)
    result = evaluate_model(model, loaders=loaders)
    footprint = measure_footprint(model, usage=result.usage)
    return {
        "name": name,
        "prune_ratio": prune_ratio,
        "keep_ratio": 1 - prune_ratio,
        "nll": result.nll,
        "nll_per_corpus": dict(result.nll_per_corpus),
        "bytes": num_bytes,
        "stored_params": footprint.stored_params,
        "active_params": round(footprint.active_params),
        "seconds": round(seconds, 2),
        "seconds_evaluation": round(time.perf_counter() - started, 2),
    }


def save_stage(folder: str | Path, *, stage: Stage) -> None:
    """Writes a row as `<folder>/stages/<name>.json`."""
    write_json(Path(folder) / "stages" / f"{stage['name']}.json", stage)


def load_stages(folder: str | Path) -> dict[str, Stage]:
    """All rows below `<folder>/stages`, by name.

    Raises:
        ValueError: there is no row there.
    """
    files = sorted(Path(folder).glob("stages/*.json"))
    rows = [read_json(file, what="row of results") for file in files if not file.name.endswith(".exports.json")]
    if not rows:
        raise ValueError(f"There are no rows of results below '{folder}/stages': run `compare` or `fit` first.")
    return {row["name"]: row for row in rows}
