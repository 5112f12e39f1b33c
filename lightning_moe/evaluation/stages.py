"""One row of a comparison: a folder on disk, reloaded and evaluated."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.adapters.storage import load_adapter
from lightning_moe.evaluation.agreement import DenseReference
from lightning_moe.evaluation.perplexity import evaluate_model
from lightning_moe.files import read_json, write_json
from lightning_moe.models.loading import DtypeName, load_model
from lightning_moe.quantization.footprint import measure_footprint, missing_channels
from lightning_moe.reporting.checks import check_known, check_mapping, check_number, check_share, check_text

Stage = dict[str, Any]

# Of a file name's 255 bytes; the others are for what is added to it.
_LONGEST_NAME = 200
_EXPORTS = ".exports"
_KNOWN = ("bytes", "stored_params", "active_params", "seconds", "seconds_evaluation", "kl", "top1_agreement")


def check_stage_name(name: str) -> str:
    """The name of a row, which is also a file's and a folder's.

    Raises:
        ValueError: it is empty, too long, not a plain file name, or one that files of another kind have.
    """
    is_plain = isinstance(name, str) and name.isprintable() and Path(name).name == name and "\\" not in name
    if not is_plain or name in ("", ".."):  # pathlib says that each is its own last part
        raise ValueError(f"`name` of a stage must be a plain file name, got {name!r}.")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"`name` of a stage must have at most {_LONGEST_NAME} bytes, got {len(name.encode())}.")
    if name.endswith(_EXPORTS):
        raise ValueError(f"`name` of a stage cannot end in '{_EXPORTS}', got {name!r}: lists of exports end so.")
    return name


def model_bytes(folder: str | Path) -> int | None:
    """Bytes on disk of a model or adapter folder: its tensors, their index and its configs.

    The tokenizer and documents do not count.

    None where `folder` is not a local folder but a hub name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    tensors = sum(file.stat().st_size for file in folder.glob("*.safetensors*"))
    return tensors + sum(file.stat().st_size for file in folder.glob("*config.json") if "tokenizer" not in file.name)


def evaluate_stage(
    name: str,
    *,
    folder: str | Path,
    loaders: Mapping[str, Iterable[Mapping[str, Tensor]]],
    seconds: float,
    prune_ratio: float | None = None,
    adapter: str | Path | None = None,
    dtype: DtypeName = "float32",
    device: torch.device | str = "cpu",
    reference: DenseReference | None = None,
    tasks: Callable[[PreTrainedModel], Mapping[str, Any]] | None = None,
) -> Stage:
    """Loads a folder (and its adapter), evaluates it, and measures what it takes.

    Args:
        name: name of the row.
        folder: a model; one without experts too, with all of its parameters active.
        loaders: one loader of batches per held-out corpus.
        seconds: what making the folder took.
        prune_ratio: the share of routed-expert channels removed; None: as counted in the folder.
        adapter: a PEFT adapter of that model, if any.
        dtype: type of the unpacked weights during evaluation.
        device: where it is evaluated.
        reference: the dense model on the same loaders, for `kl` (nats per token) and `top1_agreement` in the row.
        tasks: gives the model's scores on zero-shot tasks, for `tasks` in the row.

    Returns:
        Plain types; nll in nats per token, bytes on disk (None for a hub name), active_params as measured on the text.

    Raises:
        ValueError: the name is no plain file name, or folder, adapter or text are refused.
    """
    started, name = time.perf_counter(), check_stage_name(name)
    model = load_model(str(folder), dtype=dtype, any_family=True)
    parts = [model_bytes(path) for path in (folder, adapter) if path is not None]
    if adapter is not None:
        load_adapter(model, folder=adapter)
    model.to(device)  # pyright: ignore[reportArgumentType]: transformers wraps `to` without its types
    result = evaluate_model(model, loaders=loaders, reference=reference)
    footprint = measure_footprint(model, usage=result.usage)
    prune_ratio = missing_channels(model) if prune_ratio is None else prune_ratio
    scores: Stage = {} if reference is None else {"kl": result.kl, "top1_agreement": result.agreement}
    scores |= {} if tasks is None else {"tasks": dict(tasks(model))}
    return {
        "name": name,
        "prune_ratio": prune_ratio,
        "keep_ratio": 1 - prune_ratio,
        "nll": result.nll,
        "nll_per_corpus": dict(result.nll_per_corpus),
        "bytes": None if None in parts else sum(filter(None, parts)),
        "stored_params": footprint.stored_params,
        "active_params": round(footprint.active_params),
        "seconds": round(seconds, 2),
        "seconds_evaluation": round(time.perf_counter() - started, 2),
    } | scores


def save_stage(folder: str | Path, *, stage: Stage) -> None:
    """Writes a row as `<folder>/stages/<name>.json`."""
    write_json(Path(folder) / "stages" / f"{stage['name']}.json", stage)


def load_stages(folder: str | Path) -> dict[str, Stage]:
    """All rows below `<folder>/stages`, by name.

    Raises:
        ValueError: there is no row there, a file is not a row, or two have one name.
    """
    files = stage_files(folder)
    if not files:
        raise ValueError(f"There are no rows of results below '{folder}/stages': run `compare` or `fit` first.")
    rows: dict[str, Stage] = {}
    for file in files:
        row = load_row(file)
        if row["name"] in rows:
            raise ValueError(f"'{file}' and another file are both row {row['name']!r}. Delete one of them.")
        rows[row["name"]] = row
    return rows


def stage_files(folder: str | Path) -> list[Path]:
    """Files of rows below `<folder>/stages`, sorted."""
    return [file for file in sorted(Path(folder).glob("stages/*.json")) if not file.stem.endswith(_EXPORTS)]


def load_row(file: Path) -> Stage:
    """One row, its numbers checked.

    Raises:
        ValueError: the file is not a row; the message names the file and the field.
    """
    row = read_json(file, what="row of results")
    if not isinstance(row, dict) or not {"name", "nll", "prune_ratio"} <= row.keys():
        raise ValueError(f"'{file}' is not a row of results: it needs `name`, `nll` and `prune_ratio`. Delete it.")
    where = f"'{file}'"
    check_stage_name(check_text(row, key="name", where=where))
    for key in ("nll", "prune_ratio"):
        check_number(row, key=key, where=where)
    check_share(row, key="prune_ratio", where=where)
    for key in _KNOWN:
        check_known(row, key=key, where=where)
    for key in ("model", "digest"):
        if key in row:
            check_text(row, key=key, where=where)
    losses = check_mapping(row.get("nll_per_corpus") or {}, where=f"'nll_per_corpus' of {where}")
    for corpus in losses:
        check_number(losses, key=corpus, where=f"'nll_per_corpus' of {where}")
    tasks = check_mapping(row.get("tasks") or {}, where=f"'tasks' of {where}")
    for task in tasks:
        check_number(check_mapping(tasks[task], where=f"{task!r} of {where}"), key="acc", where=f"{task!r} of {where}")
    return row
