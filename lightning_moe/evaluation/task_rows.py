"""What lm_eval returns for each item, as one plain row a task."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean

from lightning_moe.evaluation.packed_lm import PackedLM
from lightning_moe.evaluation.task_sets import TaskSource

# Tasks that generate: what stands between prompt and answer, and the column of the answer.
_GOLD_TEXT = {"gsm8k": (" ", "answer"), "humaneval": ("", "canonical_solution"), "mbpp": ("", "code")}

Sample = Mapping[str, Any]


def task_row(
    parts: Mapping[str, TaskSource], *, tasks: Mapping[str, Any], samples: Mapping[str, Sequence[Sample]], lm: PackedLM
) -> dict[str, Any]:
    """One row from the items of all parts together.

    Args:
        parts: where each part's items came from.
        tasks: lm_eval's task of each part.
        samples: lm_eval's record of each item.
        lm: the model they went through; scores gold answers of tasks that generate.

    Returns:
        Plain types. `acc`: lm_eval's first metric of the task, named by `metric`; `stderr`: its standard error,
        s / sqrt(n) with n - 1 in s, over `num_items` of `num_available` items; further metrics under lm_eval's names,
        each with `_stderr`. `chance`: what guessing among the choices gives (0 where text is generated). `gold_nll`:
        mean over items of the loss of the right answer's text in nats per token, `gold_nll_per_char` in nats per
        character. `source`, `split`, `num_fewshot`, `fewshot_split`: where items and examples came from.
    """
    first, pooled = next(iter(tasks.values())), [item for name in tasks for item in samples[name]]
    metrics = _metrics(first, samples=pooled)
    metric, (values, *_) = next(iter(metrics.items())), [next(iter(metrics.values()))]
    row: dict[str, Any] = {"acc": _mean(values), "stderr": _stderr(values), "metric": metric[0]}
    for name, numbers in metrics.items():
        if name != "acc":
            row |= {name: _mean(numbers), f"{name}_stderr": _stderr(numbers)}
    items = [(tasks[name], item) for name in tasks for item in _once(samples[name])]
    row |= {
        "num_items": len(items),
        "num_available": sum(len(task.eval_docs) for task in tasks.values()),
        "chance": _mean([_chance(task, item) for task, item in items]),
    }
    return row | _gold_loss(items, lm=lm) | _origin(first, source=next(iter(parts.values())))


def _metrics(task: Any, *, samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Name of each metric that is a mean over items -> its values; the name says the filter where there are several."""
    filters = list(dict.fromkeys(item["filter"] for item in samples))
    aggregations = task.aggregation()
    values: dict[str, list[float]] = {}
    for item in samples:
        for metric in item["metrics"]:
            if aggregations.get(metric, mean) is mean:
                name = metric if len(filters) == 1 else f"{metric},{item['filter']}"
                values.setdefault(name, []).append(float(item[metric]))
    if not values:
        raise ValueError(
            f"Task '{task.config.task}' has no metric that is a mean over items, only {sorted(aggregations)}. Such "
            "tasks are not supported: name another."
        )
    return values


def _once(samples: Sequence[Sample]) -> list[Sample]:
    """Every item once: lm_eval has one record for each of a task's filters."""
    return list({item["doc_id"]: item for item in reversed(samples)}.values())[::-1]


def _chance(task: Any, item: Sample) -> float:
    return 1 / len(item["arguments"]) if task.OUTPUT_TYPE == "multiple_choice" else 0.0


def _gold_loss(items: Sequence[tuple[Any, Sample]], *, lm: PackedLM) -> dict[str, float | None]:
    """Loss of the right answers; nothing where a task has no text for them."""
    task = items[0][0]
    if task.OUTPUT_TYPE == "generate_until":
        if task.config.task not in _GOLD_TEXT:
            return {}
        pairs = [_gold_pair(one, item) for one, item in items]
        asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
        scores = [loglikelihood for loglikelihood, _ in lm.loglikelihood(asked)]
    else:
        golds = [_gold_index(one, item) for one, item in items]
        pairs = [item["arguments"][gold] for (_, item), gold in zip(items, golds, strict=True)]
        scores = [item["resps"][gold][0][0] for (_, item), gold in zip(items, golds, strict=True)]
    per_token = [-score / lm.num_tokens[pair] for score, pair in zip(scores, pairs, strict=True)]
    per_char = [-score / len(pair[1]) for score, pair in zip(scores, pairs, strict=True)]
    return {
        "gold_nll": _mean(per_token),
        "gold_nll_stderr": _stderr(per_token),
        "gold_nll_per_char": _mean(per_char),
        "gold_nll_per_char_stderr": _stderr(per_char),
    }


def _gold_pair(task: Any, item: Sample) -> tuple[str, str]:
    delimiter, column = _GOLD_TEXT[task.config.task]
    return item["arguments"][0][0], delimiter + item["doc"][column]


def _gold_index(task: Any, item: Sample) -> int:
    """The right choice, as lm_eval's own scoring reads it."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0
    gold = task.doc_to_text(item["doc"]) if task.multiple_input else item["target"]
    if isinstance(gold, list):
        gold = gold[0]
    return task.doc_to_choice(item["doc"]).index(gold) if isinstance(gold, str) else int(gold)


def _origin(task: Any, *, source: TaskSource) -> dict[str, Any]:
    config = task.config
    shots = int(config.num_fewshot)
    return {
        "source": source.source,
        "split": config.test_split if task.has_test_docs() else config.validation_split,
        "num_fewshot": shots,
        "fewshot_split": config.fewshot_split if shots else None,
    }


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single item."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
