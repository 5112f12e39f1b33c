"""The beginning-of-text token: added where the tokenizer itself begins a text with it, and nowhere else."""

import pytest
from text_data import write_jsonl
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lightning_moe.assets import asset_path
from lightning_moe.training.corpora import Corpus
from lightning_moe.training.data import TextDataModule

EOS = "<|endoftext|>"


def saved_tokenizer(folder, *, bos, template):
    """The shipped tokenizer with another beginning token, template of special tokens, and a chat template with it."""
    tokenizer = AutoTokenizer.from_pretrained(asset_path("small_moe"))
    tokenizer.add_special_tokens({"bos_token": bos})
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, EOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    return saved_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos="<s>", template=f"<s> $A {EOS}")


def rows_of(path, records, *, tokenizer, **corpus):
    source = write_jsonl(path / "a.jsonl", records)
    module = TextDataModule(tokenizer=tokenizer, calibration={"a": Corpus(source=source, **corpus)})
    return module.rows("calibration")["a"], module.tokenizer


def written(rows, tokenizer, *, key="input_ids"):
    (row,) = [rows[index] for index in range(len(rows))]
    kept = row["attention_mask"].bool() if key == "input_ids" else row[key] != -100
    return str(tokenizer.decode(row[key][kept]))


DOCUMENTS = [{"text": "One fish."}, {"text": ""}, {"text": "Two fish."}]


def test_every_document_begins_with_the_token(tmp_path, with_bos):
    rows, tokenizer = rows_of(tmp_path, DOCUMENTS, tokenizer=with_bos)
    assert tokenizer("")["input_ids"][0] == tokenizer.bos_token_id != tokenizer.eos_token_id
    assert written(rows, tokenizer) == f"<s>One fish.{EOS}<s>Two fish.{EOS}"
    joined, _ = rows_of(tmp_path, DOCUMENTS, tokenizer=with_bos, separator="|")
    assert written(joined, tokenizer) == f"<s>One fish.||Two fish.{EOS}"


def test_the_token_counts_towards_max_tokens(tmp_path, with_bos):
    rows, tokenizer = rows_of(tmp_path, DOCUMENTS, tokenizer=with_bos, max_tokens=1)
    assert written(rows, tokenizer) == "<s>"


def test_instructions_begin_with_the_token_without_loss(tmp_path, with_bos):
    records = [{"instruction": "Add.", "output": "3"}, {"instruction": "Say.", "output": "Hi"}]
    rows, tokenizer = rows_of(tmp_path, records, tokenizer=with_bos, format="instruction", input_field=None)
    first, second, rest = written(rows, tokenizer).split(EOS)
    assert (first.rfind("<s>Below is"), second.rfind("<s>Below is"), rest) == (0, 0, "")
    assert first.count("<s>") == second.count("<s>") == 1
    assert written(rows, tokenizer, key="labels") == f"3{EOS}Hi{EOS}"


def test_conversations_begin_as_their_template_says(tmp_path, with_bos):
    messages = [{"role": "user", "content": "Hi. "}, {"role": "assistant", "content": "Hello"}]
    rows, tokenizer = rows_of(tmp_path, [{"messages": messages}], tokenizer=with_bos, format="messages")
    assert written(rows, tokenizer) == f"<s>Hi. Hello{EOS}"


@pytest.mark.parametrize(("bos", "template"), [("<s>", f"$A {EOS}"), (EOS, f"$A {EOS}"), ("<s>", "$A")])
def test_tokenizers_that_do_not_begin_a_text_get_none(tmp_path, bos, template):
    source = saved_tokenizer(tmp_path / "tokenizer", bos=bos, template=template)
    rows, tokenizer = rows_of(tmp_path, DOCUMENTS, tokenizer=source)
    assert written(rows, tokenizer) == f"One fish.{EOS}Two fish.{EOS}"
