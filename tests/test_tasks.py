"""Zero-shot tasks: rows against a loop over choices, packed scoring against lm_eval's own, what is drawn."""

import math
import statistics

import pytest
import torch
from task_files import ARC, WINOGRANDE, save_task_sets, use_task_sets
from tiny_models import FAMILY_NAMES, tiny_model

pytest.importorskip("lm_eval", reason="tasks need lm_eval: pip install 'lightning_moe[eval]'")

from lm_eval.models.huggingface import HFLM

from lightning_moe.evaluation.packed_lm import PackedLM
from lightning_moe.evaluation.tasks import TASK_PRESETS, evaluate_tasks, plan_tasks, tasks_table
from lightning_moe.training.tokenization import load_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_task_sets(tmp_path_factory.mktemp("task_sets"))


@pytest.fixture(autouse=True)
def _local(root, monkeypatch):
    use_task_sets(monkeypatch, root)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("asset:small_moe")


def shipped_vocabulary(name="qwen3_moe", **overrides):
    return tiny_model(name, vocab_size=4096, **overrides)


def logprob(model, tokenizer, context, continuation):
    """(sum of log-probabilities, number of tokens) of a text after another, by one plain forward pass."""
    whole, num_context = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    with torch.no_grad():
        logprobs_SV = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    own = [float(logprobs_SV[i - 1, whole[i]]) for i in range(num_context, len(whole))]
    return sum(own), len(own)


def test_a_row_is_that_of_a_loop_over_choices(tokenizer):
    model = shipped_vocabulary()
    row = evaluate_tasks(model, tokenizer=tokenizer, tasks=["arc_easy"])["arc_easy"]
    right, right_by_length, per_token, per_char = [], [], [], []
    for question, choices, answer in ARC:
        gold = "ABCD".index(answer)
        context = f"Question: {question}\nAnswer:"
        scores = [logprob(model, tokenizer, context, f" {choice}") for choice in choices]
        totals = [total for total, _ in scores]
        right.append(totals.index(max(totals)) == gold)
        normed = [total / len(choice) for total, choice in zip(totals, choices, strict=True)]
        right_by_length.append(normed.index(max(normed)) == gold)
        per_token.append(-scores[gold][0] / scores[gold][1])
        per_char.append(-scores[gold][0] / (1 + len(choices[gold])))
    assert row["acc"] == statistics.fmean(right)
    assert row["acc_norm"] == statistics.fmean(right_by_length)
    assert row["stderr"] == pytest.approx(statistics.stdev(map(float, right)) / 2)  # four items
    assert row["gold_nll"] == pytest.approx(statistics.fmean(per_token), rel=1e-5)
    assert row["gold_nll_stderr"] == pytest.approx(statistics.stdev(per_token) / 2, rel=1e-4)
    assert row["gold_nll_per_char"] == pytest.approx(statistics.fmean(per_char), rel=1e-5)
    assert row["chance"] == pytest.approx((1 / 3 + 3 / 4) / 4)  # one question of three choices, three of four
    assert (row["metric"], row["num_items"], row["num_available"]) == ("acc", 4, 4)
    assert (row["split"], row["num_fewshot"], row["fewshot_split"]) == ("validation", 0, None)


def test_choices_that_stand_before_the_end(tokenizer):
    """WinoGrande's choices are contexts, and what is scored is the rest of the sentence."""
    model = shipped_vocabulary("mixtral")
    row = evaluate_tasks(model, tokenizer=tokenizer, tasks=["winogrande"])["winogrande"]
    right, gold_nll = [], []
    for sentence, first, second, answer in WINOGRANDE:
        begin, end = sentence.split("_")
        scores = [logprob(model, tokenizer, begin + option, f" {end.strip()}") for option in (first, second)]
        gold = int(answer) - 1
        right.append(scores[gold][0] > scores[1 - gold][0])
        gold_nll.append(-scores[gold][0] / scores[gold][1])
    assert row["acc"] == statistics.fmean(right)
    assert row["gold_nll"] == pytest.approx(statistics.fmean(gold_nll), rel=1e-5)


def test_columns_that_have_other_names_and_prepared_items(tokenizer):
    model = shipped_vocabulary()
    rows = evaluate_tasks(model, tokenizer=tokenizer, tasks=["boolq", "hellaswag", "piqa"])
    nll = [
        -logprob(model, tokenizer, f"{passage}\nQuestion: {question}?\nAnswer:", answer)[0]
        for question, answer, passage in (
            ("is the sky blue", " yes", "The sky is blue."),
            ("do fish fly", " no", "Fish swim in the sea."),
        )
    ]
    assert rows["boolq"]["gold_nll_per_char"] == pytest.approx((nll[0] / 4 + nll[1] / 3) / 2, rel=1e-5)
    first = logprob(model, tokenizer, "Cooking: A man cuts bread. He", " paints.")
    second = logprob(model, tokenizer, "Cooking: A man cuts bread. She", " eats it.")
    expected = -(first[0] / first[1] + second[0] / second[1]) / 2
    assert rows["hellaswag"]["gold_nll"] == pytest.approx(expected, rel=1e-5)
    assert {row["chance"] for row in rows.values()} == {0.5, 0.25}


CASES = [
    ("Water is", " wet"),
    ("Water is", " very wet and cold"),
    ("Water is", " dry"),
    ("A longer beginning of a text that goes on for a while, and", " ends"),
    ("A longer beginning of a text that goes on for a while, and", " ends here"),
    ("", "No context at all"),
]


def asked(pairs):
    from lm_eval.api.instance import Instance

    return [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_packed_scores_are_those_of_lm_eval(name, tokenizer):
    model = shipped_vocabulary(name)
    own = PackedLM(model, tokenizer=tokenizer, row_tokens=16).loglikelihood(asked(CASES))
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(asked(CASES), disable_tqdm=True)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in stock]
    assert [score for score, _ in own] == pytest.approx([score for score, _ in stock], rel=1e-4)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_greedy_answers_and_long_contexts(tokenizer):
    """The likeliest continuation is known as such; what exceeds the model's length loses its beginning."""
    model = shipped_vocabulary(max_position_embeddings=16)
    lm = PackedLM(model, tokenizer=tokenizer)
    context = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    ids = tokenizer.encode(context)
    assert len(ids) > 16
    with torch.no_grad():
        logprobs_V = model(torch.tensor([ids[-16:]])).logits[0, -1].log_softmax(-1)
    best = int(logprobs_V.argmax())
    ((score, greedy), (other, not_greedy)) = lm._loglikelihood_tokens(
        [(("c", "best"), ids, [best]), (("c", "other"), ids, [(best + 1) % 4096])]
    )
    assert (greedy, not_greedy) == (True, False)
    assert score == pytest.approx(float(logprobs_V[best]), rel=1e-5)
    assert other == pytest.approx(float(logprobs_V[(best + 1) % 4096]), rel=1e-5)


def test_contexts_are_computed_once(tokenizer):
    lm = PackedLM(shipped_vocabulary(), tokenizer=tokenizer)
    lm._loglikelihood_tokens([(None, [5, 6, 7, 8], [9]), (None, [5, 6, 7, 8], [10, 11, 12])])
    assert lm.num_computed == 4 + 0 + 2  # the last token of a continuation is only predicted


def test_a_sample_of_the_items_is_drawn_by_the_seed(tokenizer):
    model = shipped_vocabulary()

    def row(**settings):
        return evaluate_tasks(model, tokenizer=tokenizer, tasks=["arc_easy"], **settings)["arc_easy"]

    assert row(limit=2) == row(limit=2)
    assert (row(limit=2)["num_items"], row(limit=2)["num_available"]) == (2, 4)
    losses = {row(limit=2, seed=seed)["gold_nll"] for seed in range(4)}
    assert len(losses) > 1
    assert row(limit=99) == row()
    assert row(limit=1)["stderr"] is None


def test_a_group_is_one_row_of_all_its_items(tokenizer):
    model = shipped_vocabulary()
    rows = evaluate_tasks(model, tokenizer=tokenizer, tasks=["ai2_arc", "arc_easy", "arc_challenge"])
    whole, easy, challenge = rows.values()
    assert (whole["num_items"], easy["num_items"], challenge["num_items"]) == (6, 4, 2)
    assert whole["acc"] == pytest.approx((4 * easy["acc"] + 2 * challenge["acc"]) / 6)
    assert whole["gold_nll"] == pytest.approx((4 * easy["gold_nll"] + 2 * challenge["gold_nll"]) / 6)
    assert evaluate_tasks(model, tokenizer=tokenizer, tasks=["ai2_arc"], limit=3)["ai2_arc"]["num_items"] == 4


def test_presets_are_tasks_once_each():
    names = [task.name for task in plan_tasks(["paper_b_six", "piqa"])]
    assert names == ["arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "winogrande"]
    assert TASK_PRESETS["paper_a_general"] == (*names, "mmlu")


def test_the_table(tokenizer):
    rows = evaluate_tasks(shipped_vocabulary(), tokenizer=tokenizer, tasks=["piqa"], limit=1)
    header, line = tasks_table(rows).splitlines()
    assert header.split() == ["task", "metric", "score", "+-", "chance", "items", "gold", "loss", "+-"]
    assert line.split()[:2] == ["piqa", "acc"]
    assert line.split()[3:6] == ["-", "0.5000", "1"]
    assert math.isclose(float(line.split()[6]), rows["piqa"]["gold_nll"], abs_tol=1e-4)
