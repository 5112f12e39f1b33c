"""Tasks that generate text, and programs that are run only when that is asked for."""

import pytest
from task_files import save_task_sets, use_task_sets
from tiny_models import tiny_model

pytest.importorskip("lm_eval", reason="tasks need lm_eval: pip install 'lightning_moe[eval]'")

from lightning_moe.evaluation import code_execution
from lightning_moe.evaluation.code_execution import PassAtOne, passes
from lightning_moe.evaluation.packed_lm import PackedLM
from lightning_moe.evaluation.tasks import evaluate_tasks
from lightning_moe.training.tokenization import load_tokenizer


@pytest.fixture(autouse=True)
def _local(tmp_path, monkeypatch):
    use_task_sets(monkeypatch, save_task_sets(tmp_path / "task_sets"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("asset:small_moe")


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=4096, max_position_embeddings=1024)


def answering(monkeypatch, answers):
    """Generation gives these texts, by what the last paragraph of the prompt holds; the prompts are returned."""
    prompts = []

    def generate(_self, requests, disable_tqdm=False):
        prompts.extend(request.args[0] for request in requests)
        last = [prompt.rpartition("\n\n")[2] for prompt in prompts]
        return [next(text for key, text in answers.items() if key in paragraph) for paragraph in last]

    monkeypatch.setattr(PackedLM, "generate_until", generate)
    return prompts


def test_a_tiny_model_generates(model, tokenizer):
    row = evaluate_tasks(model, tokenizer=tokenizer, tasks=["gsm8k"], limit=2)["gsm8k"]
    assert row["metric"] == "exact_match,strict-match"
    assert row["acc"] == row["exact_match,flexible-extract"] == 0.0
    assert (row["num_items"], row["num_available"], row["chance"]) == (2, 7, 0.0)


def test_right_answers_count_and_the_examples_leave_the_item_out(model, tokenizer, monkeypatch):
    prompts = answering(monkeypatch, {f"is {i} + 1": f" #### {i + 1}" for i in range(6)} | {"is 6 + 1": " It is 7."})
    row = evaluate_tasks(model, tokenizer=tokenizer, tasks=["math"])["gsm8k"]
    assert row["acc"] == pytest.approx(6 / 7)  # the seventh lacks the form
    assert row["exact_match,flexible-extract"] == 1.0
    assert (row["num_fewshot"], row["fewshot_split"]) == (5, "test")
    for prompt in prompts:
        questions = [line for line in prompt.splitlines() if line.startswith("Question: ")]
        assert len(questions) == len(set(questions)) == 6
    # The right answer's loss, after the same prompt.
    lm = PackedLM(model, tokenizer=tokenizer)
    pairs = [(prompt, f" It is {i + 1}.\n#### {i + 1}") for i, prompt in enumerate(prompts)]
    encoded = [(pair, *lm._encode_pair(*pair)) for pair in pairs]
    scores = lm._loglikelihood_tokens(encoded)
    losses = [-score / lm.num_tokens[pair] for pair, (score, _) in zip(pairs, scores, strict=True)]
    assert row["gold_nll"] == pytest.approx(sum(losses) / 7, rel=1e-5)


def test_programs_are_refused_before_anything_runs(monkeypatch, tokenizer):
    monkeypatch.setattr(PackedLM, "__init__", lambda *_args, **_kwargs: pytest.fail("a model was wrapped"))
    with pytest.raises(
        ValueError, match=r"Task 'humaneval' runs Python programs that the model wrote.*allow_code_exec"
    ):
        evaluate_tasks(None, tokenizer=tokenizer, tasks=["piqa", "code"])


def test_programs_that_pass_their_tests_count(model, tokenizer, monkeypatch):
    answering(monkeypatch, {"def add": "    return a + b\n", "def twice": "    return a\n"})
    row = evaluate_tasks(model, tokenizer=tokenizer, tasks=["humaneval"], allow_code_execution=True)["humaneval"]
    assert (row["metric"], row["acc"], row["num_items"]) == ("pass@1", 0.5, 2)
    assert row["gold_nll"] > 0


def test_other_metrics_stay_the_hubs(monkeypatch):
    monkeypatch.setattr(code_execution.evaluate, "load", lambda path, *args: (path, *args))
    with code_execution.local_code_eval():
        assert code_execution.evaluate.load("rouge", "x") == ("rouge", "x")
        assert isinstance(code_execution.evaluate.load("code_eval"), PassAtOne)


def test_mbpp_brings_its_own_examples(model, tokenizer, monkeypatch):
    prompts = answering(monkeypatch, {"inc": "def inc(a):\n    return a + 1\n"})
    row = evaluate_tasks(model, tokenizer=tokenizer, tasks=["mbpp"], allow_code_execution=True)["mbpp"]
    assert row["acc"] == 1.0
    assert row["num_fewshot"] == 3
    assert prompts[0].count("You are an expert Python programmer") == 4


def test_programs_end_in_one_way_or_another(tmp_path):
    assert passes("assert 1 + 1 == 2")
    assert not passes("assert 1 + 1 == 3")
    assert not passes("this is no program")
    assert not passes("while True: pass", seconds=0.3)
    for leaving in ("import sys\nsys.exit(0)", "quit()", "import os\nos._exit(0)"):
        assert not passes(f"{leaving}\nassert False")
    assert passes("if __name__ == '__main__':\n    raise SystemExit(0)\n")
    assert passes("import os, pathlib; assert not any(k in os.environ for k in ('HOME', 'PYTHONPATH'))")
    passed, nothing = PassAtOne().compute(
        references=["assert f(1) == 1", "assert f(1) == 2"], predictions=[["def f(x): return x"]] * 2, k=[1]
    )
    assert (passed, nothing) == ({"pass@1": 0.5}, None)
