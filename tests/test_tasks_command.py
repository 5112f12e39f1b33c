"""`evaluate --tasks`, `--stride` and `--reference` from the command line."""

import json

import pytest
import yaml
from cli_runs import run, save_job
from task_files import save_task_sets, use_task_sets
from tiny_models import tiny_model

pytest.importorskip("lm_eval", reason="tasks need lm_eval: pip install 'lightning_moe[eval]'")

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.adapters.storage import save_adapter
from lightning_moe.commands._tasks import TaskRequest
from lightning_moe.evaluation.tasks import evaluate_tasks
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts
from lightning_moe.training.tokenization import load_tokenizer


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = save_job(tmp_path_factory.mktemp("job"))
    save_task_sets(job / "task_sets")
    return job


@pytest.fixture(autouse=True)
def _local(job, monkeypatch):
    use_task_sets(monkeypatch, job / "task_sets")


def evaluated(job, *flags, model="model"):
    out = job / "out"
    run("evaluate", "--config", job / "data.yaml", "--model", job / model, "--out", out, *flags)
    return json.loads((out / "stages" / "evaluated.json").read_text())


def test_tasks_of_a_packed_folder_with_its_adapter(job, capsys, caplog):
    model = tiny_model(vocab_size=4096)
    convert_experts(model)
    quantize_model(model)
    save_ragged(model, job / "packed")
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=2))
    save_adapter(peft_model, folder=job / "adapter")
    row = evaluated(job, "--tasks", "paper_b_six", "--limit", "2", "--adapter", job / "adapter", model="packed")
    tokenizer = load_tokenizer("asset:small_moe")
    expected = evaluate_tasks(model, tokenizer=tokenizer, tasks=["paper_b_six"], limit=2)
    assert row["tasks"].keys() == expected.keys()
    for name, task in expected.items():
        assert row["tasks"][name]["acc"] == task["acc"]
        assert row["tasks"][name]["gold_nll"] == pytest.approx(task["gold_nll"], rel=1e-5)
    assert "winogrande      acc" in caplog.text
    assert "it/s" not in capsys.readouterr().err  # no bars where nobody watches


def test_tasks_are_checked_before_the_model_is_read(job, capsys):
    with pytest.raises(SystemExit):
        evaluated(job, "--tasks", "code", model="missing")
    assert "Give `allow_code_execution`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluated(job, "--tasks", "arc_easy,no_such_task", model="missing")
    assert "Unknown tasks ['no_such_task']" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluated(job, "--tasks", "arc_easy", "--limit", "0", model="missing")
    assert "`limit` must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluated(job, "--name", "a/b", model="missing")
    assert "`name` of a stage must be a plain file name, got 'a/b'" in capsys.readouterr().err


def test_rows_with_other_tasks_are_not_reused(job, tmp_path):
    asked = {"tasks": "arc_easy", "limit": 2, "seed": 0, "allow_code_execution": False}
    decides = TaskRequest(**asked).decides
    assert decides == TaskRequest(**asked | {"tasks": ["arc_easy"]}).decides
    assert decides["lm_eval"]
    assert decides["sources"] == {"arc_easy": str(job / "task_sets")}
    assert decides != TaskRequest(**asked | {"seed": 1}).decides
    settings = {"grid": {"methods": ["reap"], "ratios": [0.5]}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    files = ("--config", job / "data.yaml", "--config", tmp_path / "job.yaml")
    flags = ("--tasks", "arc_easy", "--limit", "2", "--seed", "1")
    run("compare", *files, "--model", job / "model", "--out", tmp_path / "out", *flags)
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["tasks"]["arc_easy"]["num_items"] for row in rows] == [2, 2]


def test_windows_and_the_dense_model(job):
    plain = evaluated(job)
    row = evaluated(job, "--stride", "8", "--reference", job / "model")
    assert row["nll_per_corpus"].keys() == plain["nll_per_corpus"].keys()
    assert row["nll"] != plain["nll"]
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["top1_agreement"] == 1.0
    assert not {"kl", "top1_agreement", "tasks"} & plain.keys()
