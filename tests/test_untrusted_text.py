"""Corpora, tokenizers and chat templates that somebody else wrote."""

import gzip
import json
import shutil
import socket
from pathlib import Path

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageColumn
from PIL import Image
from pyarrow import Table
from pyarrow.parquet import write_table

from lightning_moe.assets import asset_path
from lightning_moe.training.corpora import Corpus, check_corpus, read_records
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.examples import message_examples
from lightning_moe.training.json_checks import DEEPEST, check_json, depth
from lightning_moe.training.tokenization import corpus_rows, load_tokenizer

TALK = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"})
LINE = b'{"text": "some words of a text"}\n'


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("asset:small_moe")


def rows_of(file, *, tokenizer, **fields):
    corpus = Corpus(source=str(file), **fields)
    check_corpus(corpus, name="own")
    return corpus_rows(corpus, name="own", tokenizer=tokenizer, sequence_length=16, keep_last=True)


def refused(file, content, *, tokenizer, message, **fields):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"Corpus 'own': .*{message}") as error:
        rows_of(file, tokenizer=tokenizer, **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        (b'{"a": 1}', 1),
        (b'{"a": [{"b": []}]}', 4),
        (b'{"a": "[[[[{{{{"}', 1),
        (rb'{"a": "\"[[", "b": [1]}', 2),
        (rb'{"a": "\\", "b": [[]], "c": "["}', 3),
        (b"[1], [2], [[3]]", 2),
        (b"", 0),
    ],
)
def test_depth_of_json_is_that_outside_of_strings(text, levels):
    assert depth(text) == levels


@pytest.mark.parametrize("kind", ["zip", "gzip", "tar"])
def test_an_archive_is_not_unpacked_whatever_its_name(tmp_path, tokenizer, kind):
    """`datasets` would unpack it into the user's cache."""
    (tmp_path / "talk.jsonl").write_bytes(LINE * 50)
    if kind == "gzip":
        packed = gzip.compress(LINE * 50)
    else:
        packed = Path(shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path, "talk.jsonl")).read_bytes()
    message = rf"own.jsonl' is a {kind} archive\. Unpack it, and name what was in it"
    refused(tmp_path / "own.jsonl", packed, tokenizer=tokenizer, message=message)


@pytest.mark.parametrize("length", [[256], {"a": 1}, "256"])
def test_a_tokenizer_s_longest_text_is_a_number(tmp_path, length):
    folder = shutil.copytree(asset_path("small_moe"), tmp_path / "own")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": length}))
    with pytest.raises(ValueError, match=r"No tokenizer found at .*`model_max_length` is .*, not a number"):
        load_tokenizer(str(folder))


def test_json_nested_deeper_than_the_parser_s_stack_is_refused_before_it_is_parsed(tmp_path, tokenizer):
    """20,000 levels end the process inside the JSON parser."""
    deep = b'{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\n"
    message = rf"line 2 of '.*own.jsonl' is nested more than {DEEPEST} levels deep. Remove it"
    refused(tmp_path / "own.jsonl", LINE + deep, tokenizer=tokenizer, message=message)
    hidden = b'{"text": ' + b'["]", ' * 20_000 + b"]" * 20_000 + b"}\n"
    message = rf"line 1 of '.*hidden.json' is nested more than {DEEPEST} levels deep"
    refused(tmp_path / "hidden.json", hidden, tokenizer=tokenizer, message=message)


@pytest.mark.parametrize(
    ("name", "content", "number"),
    [
        ("own.jsonl", b"null\n" + LINE, 1),
        ("own.jsonl", b"\n \t null\n" + LINE, 2),
        ("own.jsonl", b"\xef\xbb\xbfnull\n", 1),
        ("own.jsonl", LINE + b"null\n", 2),  # the parser reads ten megabytes at a time: it may begin with this line
        ("own.json", b"null", 1),
        ("own.json", LINE + b"null\n", 2),
    ],
)
def test_null_in_place_of_a_record_is_refused_before_it_is_parsed(tmp_path, tokenizer, name, content, number):
    """It ends the process inside the JSON parser, where it comes first."""
    message = rf"line {number} of '.*{name}' is null and no record. Remove it"
    refused(tmp_path / name, content, tokenizer=tokenizer, message=message)


def test_null_inside_of_a_value_over_many_lines_is_read(tmp_path, tokenizer):
    rows = [{"text": "some words", "page": None}] * 3
    (tmp_path / "own.json").write_text(json.dumps(rows, indent=1))
    assert len(rows_of(tmp_path / "own.json", tokenizer=tokenizer)) > 0
    (tmp_path / "nested.json").write_text('{"text":\n"some words", "page":\nnull\n}\n')
    check_json(tmp_path / "nested.json", name="own")


def test_text_full_of_brackets_is_no_nesting(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"text": "[{" * 5000 + '"\\"' * 50}) + "\n")
    check_json(file, name="own")
    assert next(iter(read_records(Corpus(source=str(file)), name="own")))["text"].startswith("[{[{")


@pytest.mark.parametrize("name", ["*.jsonl", "a[1].jsonl", "a?.jsonl", "{a,b}.jsonl", "zip::a.jsonl"])
def test_a_file_s_name_is_no_pattern_for_other_files(tmp_path, name):
    (tmp_path / "other.jsonl").write_bytes(LINE)
    (tmp_path / name).write_bytes(LINE)
    with pytest.raises(ValueError, match=r"would be read as a pattern of names\. Rename it, without"):
        check_corpus(Corpus(source=str(tmp_path / name)), name="own")
    with pytest.raises(ValueError, match="would be read as a pattern of names"):
        check_corpus(Corpus(source=str(tmp_path)), name="own")
    (tmp_path / name).unlink()
    check_corpus(Corpus(source=str(tmp_path / "*.jsonl")), name="own")  # a pattern that was meant as one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "\xff\xfe"}\n', "can't decode byte 0xff"),
        (LINE * 3 + b'{"text": "\xff\xfe"}\n', "can't decode byte 0xff"),
        (b'{"text": "a \\ud800 b"}\n', "surrogate pair in string is invalid"),
        (LINE + b"5\n", "JSON parse error"),
        (LINE + b'{"text": "abc', "Missing a closing quotation mark"),
        (b'{"text": "a", "text": 5}\n', "specified twice"),
        (LINE + b'{"text": 5}\n', "field 'text' must hold text"),
        (LINE + b'{"other": "x"}\n', "field 'text' must hold text, got NoneType"),
        (b'{"text": {"a": {"b": "x"}}}\n', "field 'text' must hold text, got dict"),
    ],
)
def test_damaged_json_is_named_with_its_cause(tmp_path, tokenizer, content, message):
    refused(tmp_path / "own.jsonl", content, tokenizer=tokenizer, message=message)


def test_damaged_files_of_other_types_are_named(tmp_path, tokenizer):
    refused(tmp_path / "own.txt", b"\xff\xfe\x00 text", tokenizer=tokenizer, message="can't decode byte 0xff")
    refused(tmp_path / "own.parquet", b"PAR1 no PAR1", tokenizer=tokenizer, message="Parquet file size is 12 bytes")
    Dataset.from_dict({"text": ["a text of words"] * 50}).to_parquet(tmp_path / "cut.parquet")
    whole = (tmp_path / "cut.parquet").read_bytes()
    refused(tmp_path / "cut.parquet", whole[:-100], tokenizer=tokenizer, message="cannot read")


def test_text_of_nul_and_numbers_beyond_any_type_is_read(tmp_path, tokenizer):
    (tmp_path / "own.jsonl").write_bytes(LINE + b'{"text": "a\\u0000b", "n": ' + b"9" * 5000 + b"}\n")
    assert len(rows_of(tmp_path / "own.jsonl", tokenizer=tokenizer)) > 0


def test_a_local_corpus_is_nobody_else_s_business(tmp_path, tokenizer, monkeypatch):
    """The library that reads it would send a request for each file, to count it."""

    def connect(*arguments, **_):
        raise AssertionError(f"asked for an address: {arguments}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, connect)
    asked = []
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append("a session") or 1 / 0)
    (tmp_path / "own.jsonl").write_bytes(LINE)
    assert len(rows_of(tmp_path / "own.jsonl", tokenizer=tokenizer)) > 0
    assert asked == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shuffle_seed": -1}, "`shuffle_seed` must be at least 0 or null, got -1"),
        ({"source": "a\0b.jsonl"}, "`source` cannot hold the character NUL"),
    ],
)
def test_values_of_a_corpus_are_checked_before_it_is_read(tmp_path, fields, message):
    (tmp_path / "own.jsonl").write_bytes(LINE)
    with pytest.raises(ValueError, match=message):
        check_corpus(Corpus(**({"source": str(tmp_path / "own.jsonl")} | fields)), name="own")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 10**12}, "`sequence_length` must be at most 16,777,216, got 1000000000000"),
        ({"calibration_sequence_length": 10**30}, "`calibration_sequence_length` must be at most 16,777,216"),
        ({"batch_size": 10**12}, "`batch_size` must be at most 16,777,216"),
        ({"num_workers": 10**6}, "`num_workers` must be at most 1024, got 1000000: each is a process"),
        ({"seed": -1}, "`seed` of the data must be from 0 to 9223372036854775807, got -1"),
        ({"seed": 2**63}, "`seed` of the data must be from 0 to"),
    ],
)
def test_rows_are_not_made_longer_than_memory(settings, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(tokenizer="asset:small_moe", **settings)


@pytest.fixture
def folder(tmp_path):
    """The shipped tokenizer, to be damaged."""
    for file in asset_path("small_moe").glob("*token*"):
        shutil.copy(file, tmp_path)
    for name in ("config.json", "chat_template.jinja"):
        shutil.copy(asset_path("small_moe") / name, tmp_path)
    return tmp_path


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


EVIL = "from pathlib import Path\nPath({!r}).touch()\nclass Evil:\n    pass\n"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_tokenizer_s_folder_runs_and_nobody_is_asked(folder, monkeypatch, name):
    def ask(question=""):
        raise AssertionError(f"asked: {question}")

    monkeypatch.setattr("builtins.input", ask)
    auto_map = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    change(folder / name, auto_map=auto_map, model_type="evil", tokenizer_class="Evil")
    (folder / "evil.py").write_text(EVIL.format(str(folder / "ran")))
    loaded = load_tokenizer(str(folder))
    assert loaded("a b")["input_ids"] == load_tokenizer("asset:small_moe")("a b")["input_ids"]
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\x00"),
        ("tokenizer.json", b'{"added_tokens": [], "model": 5}'),
        ("tokenizer.json", b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": 3}}'),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[" * 50_000),
        ("tokenizer_config.json", b'{"tokenizer_class": 5}'),
        ("tokenizer_config.json", b'{"eos_token": 5}'),
        ("tokenizer_config.json", b'{"auto_map": "x.y"}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerBase"}'),
        ("tokenizer_config.json", b'{"tokenizer_class": "Qwen3MoeForCausalLM"}'),
        ("chat_template.jinja", b"\xff\xff"),
    ],
)
def test_a_damaged_tokenizer_is_named_in_one_line(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"No tokenizer found at '{folder}'") as error:
        load_tokenizer(str(folder))
    assert "\n" not in str(error.value)


def test_lack_of_memory_is_no_damage(folder, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("lightning_moe.training.tokenization.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(MemoryError):
        load_tokenizer(str(folder))


def test_files_that_a_tokenizer_s_config_names_elsewhere_are_not_read(folder):
    change(folder / "tokenizer_config.json", tokenizer_file="/etc/passwd", vocab_file="/etc/passwd")
    assert load_tokenizer(str(folder)).vocab_size == load_tokenizer("asset:small_moe").vocab_size


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages.x.y }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 1 + 'a' }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ 'a' * 10 ** 15 }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages[7]['content'] }}",
        "{{ messages[0]['content'].items() }}",
    ],
)
def test_a_template_that_fails_or_wants_out_is_told_in_one_line(template):
    tokenizer = load_tokenizer("asset:small_moe")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"The chat template of '.*' cannot write") as error:
        list(message_examples(list(TALK), name="own", tokenizer=tokenizer))
    assert "\n" not in str(error.value)


def test_messages_of_wrong_types_are_told_with_the_template(tmp_path, tokenizer):
    talk = [{"role": "user", "content": {"a": 1}}, TALK[1]]
    (tmp_path / "own.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    with pytest.raises(ValueError, match=r"The chat template of '.*' cannot write .* can only concatenate str"):
        rows_of(tmp_path / "own.jsonl", tokenizer=tokenizer, format="messages")


@pytest.mark.parametrize("address", ["file", "http://127.0.0.1:9/picture.png"])
def test_a_column_of_pictures_opens_no_file_and_no_address(tmp_path, tokenizer, monkeypatch, address):
    """A parquet file says itself which of its columns are names of pictures; `datasets` would open what they name."""
    outside = tmp_path / "outside.png"
    Image.new("RGB", (2, 2)).save(outside)
    opened = []
    monkeypatch.setattr(Image, "open", lambda *args, **settings: opened.append(args))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: opened.append(args))
    picture = {"bytes": None, "path": str(outside) if address == "file" else address}
    kinds = {"text": Value("string"), "picture": ImageColumn(), "more": List(ImageColumn())}
    cells = {"text": ["some words"], "picture": [picture], "more": [[picture]]}
    write_table(Table.from_pydict(cells, schema=Features(kinds).arrow_schema), tmp_path / "own.parquet")
    assert rows_of(tmp_path / "own.parquet", tokenizer=tokenizer).num_tokens > 0
    with pytest.raises(ValueError, match="has no field 'picture', only text"):
        rows_of(tmp_path / "own.parquet", tokenizer=tokenizer, field="picture")
    assert opened == []
