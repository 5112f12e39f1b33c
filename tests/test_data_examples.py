"""Instructions and conversations: what carries loss."""

import logging

import pytest
from text_data import TOKENIZER, data_module, write_jsonl
from transformers import AutoTokenizer

from lightning_moe.assets import asset_path
from lightning_moe.training.corpora import Corpus
from lightning_moe.training.examples import message_examples
from lightning_moe.training.tokenization import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def test_instruction_prompt_carries_no_loss(tmp_path, tokenizer):
    source = write_jsonl(
        tmp_path / "alpaca.jsonl",
        [
            {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"},
            {"instruction": "Say hello.", "input": "", "output": "Hello!"},
        ],
    )
    module = data_module(train={"alpaca": Corpus(source=source, format="instruction")}, sequence_length=96)
    rows = module.rows("train")["alpaca"]
    assert len(rows) == 2
    prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    prompt_ids, answer_ids = (tokenizer(text)["input_ids"] for text in (prompt, "3<|endoftext|>"))
    length = len(prompt_ids) + len(answer_ids)
    assert rows[0]["input_ids"][:length].tolist() == prompt_ids + answer_ids
    assert rows[0]["labels"].tolist() == [-100] * len(prompt_ids) + answer_ids + [-100] * (96 - length)
    learnt = rows[1]["labels"][rows[1]["labels"] != -100]
    assert tokenizer.decode(learnt) == "Hello!<|endoftext|>"
    assert "Input" not in tokenizer.decode(rows[1]["input_ids"])


def test_instruction_fields_have_names_and_input_is_optional(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "gsm8k.jsonl", [{"question": "2 + 2?", "answer": "#### 4"}])
    corpus = Corpus(
        source=source,
        format="instruction",
        instruction_field="question",
        input_field=None,
        output_field="answer",
    )
    row = data_module(calibration={"gsm8k": corpus}, sequence_length=96).rows("calibration")["gsm8k"][0]
    assert tokenizer.decode(row["labels"][row["labels"] != -100]) == "#### 4<|endoftext|>"


def test_max_tokens_of_examples_is_not_passed(tmp_path):
    records = [{"instruction": "Repeat.", "input": None, "output": "word " * 10}] * 20
    corpus = Corpus(source=write_jsonl(tmp_path / "a.jsonl", records), format="instruction", max_tokens=200)
    num_tokens = data_module(train={"a": corpus}, sequence_length=128).rows("train")["a"].num_tokens
    assert 100 < num_tokens <= 200


def test_examples_whose_prompt_fills_a_row_are_left_out_with_a_warning(tmp_path, caplog):
    records = [{"instruction": "x " * 500, "output": "a"}, {"instruction": "short", "output": "b"}]
    corpus = Corpus(source=write_jsonl(tmp_path / "a.jsonl", records), format="instruction", input_field=None)
    with caplog.at_level(logging.WARNING):
        rows = data_module(train={"a": corpus}, sequence_length=96).rows("train")["a"]
    assert len(rows) == 1
    assert "left out 1 of 2 examples" in caplog.text


CONVERSATION = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]


def test_messages_learn_only_what_the_assistant_writes(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CONVERSATION}])
    module = data_module(train={"chat": Corpus(source=source, format="messages")}, sequence_length=64)
    row = module.rows("train")["chat"][0]
    text = tokenizer.decode(row["input_ids"][row["attention_mask"].bool()])
    assert text == tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.decode(row["labels"][row["labels"] != -100]) == "Hello<|endoftext|>\nSee you<|endoftext|>\n"


def test_template_that_rewrites_earlier_turns_gives_an_example_per_turn():
    tokenizer = AutoTokenizer.from_pretrained(asset_path("small_moe"))
    # As Qwen3: a turn has its thoughts only while it is the last one.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '(thinks)' }}{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    examples = list(message_examples(CONVERSATION, name="chat", tokenizer=tokenizer))
    written = [[(segment.text, segment.learn) for segment in example] for example in examples]
    assert written == [
        [("<user>Hi<assistant>", False), ("(thinks)Hello", True)],
        [("<user>Hi<assistant>Hello<user>Bye<assistant>", False), ("(thinks)See you", True)],
    ]


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (CONVERSATION, None, "has no chat template"),
        ("Hi", "x", "messages must be a list of {role, content}, got 'Hi'"),
        ([{"from": "human"}], "x", "messages must be a list"),
        (CONVERSATION[:1], "x", "no assistant turn"),
        (
            CONVERSATION,
            "{% if add_generation_prompt %}A{% else %}B{% endif %}",
            "template does not continue its own prompt, got 'B'",
        ),
    ],
)
def test_wrong_messages_are_refused(messages, template, message):
    tokenizer = AutoTokenizer.from_pretrained(asset_path("small_moe"))
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        list(message_examples(messages, name="chat", tokenizer=tokenizer))
