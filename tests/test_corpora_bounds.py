"""Corpora that are short on the disk and long in memory, and documents longer than a tokenizer should see at once."""

import json
from decimal import Decimal

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_moe.training import corpora, long_texts, parquet_checks
from lightning_moe.training.corpora import Corpus
from lightning_moe.training.long_texts import Piece, batches, pieces
from lightning_moe.training.parquet_checks import check_parquet
from lightning_moe.training.tokenization import corpus_rows, load_tokenizer

LONG = "word " * 200_000
STORY = "It was 7 o'clock, and  nobody had come.\n\nThen, says Zoë, 1234 birds; ünd \t so on... " * 60


def metaspace_tokenizer():
    """As SentencePiece does: a space becomes part of the next word, and one is put before a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([STORY], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def tokenizer(request):
    return load_tokenizer("asset:small_moe") if request.param == "byte_level" else metaspace_tokenizer()


def ids_of(text, *, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stream_of(source, *, tokenizer, **fields):
    """The tokens of a corpus, as training reads them."""
    rows = corpus_rows(
        Corpus(source=str(source), **fields), name="own", tokenizer=tokenizer, sequence_length=64, keep_last=True
    )
    return [int(token) for row, length in zip(rows.input_ids_NS, rows.length_N, strict=True) for token in row[:length]]


def save(folder, texts):
    (folder / "own.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder / "own.jsonl"


def talk(text):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text}]


def nested(text, *, rows):
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    return pa.array([talk(text)] * rows, type=kind)


BOMBS = {
    "a text and its rows": lambda: pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array([LONG])),
    "conversations": lambda: nested(LONG, rows=140),
    "one text": lambda: pa.array(["a" * 2**23]),
    "rows without text": lambda: pa.nulls(2**20, pa.string()),
    "numbers": lambda: pa.repeat(7, 2**20),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_parquet_file_that_stands_for_much_more_than_its_length_is_not_read(tmp_path, monkeypatch, kind):
    """The first two with the real bound."""
    allowed = 2**28 if kind in ("a text and its rows", "conversations") else 2**22
    monkeypatch.setattr(parquet_checks, "_ALWAYS_ALLOWED", allowed)
    write_table(pa.table({"text": BOMBS[kind]()}), tmp_path / "own.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "own.parquet").stat().st_size < 2**15
    monkeypatch.setattr(corpora, "load_dataset", lambda *_, **__: pytest.fail("it was read"))
    told = rf"^Corpus 'own': cannot read .*own.parquet' is [\d,]+ bytes long and stands for more than {allowed:,}"
    with pytest.raises(ValueError, match=told):
        stream_of(tmp_path / "own.parquet", tokenizer=None)


def test_what_a_long_file_stands_for_grows_with_it(tmp_path, monkeypatch):
    """Up to a hundred times its length."""
    monkeypatch.setattr(parquet_checks, "_ALWAYS_ALLOWED", 1)
    write_table(pa.table({"text": ["a text of words"] * 20, "page": range(20)}), tmp_path / "own.parquet")
    check_parquet(tmp_path / "own.parquet", name="own")


def test_parquet_of_any_kind_of_column_is_looked_through(tmp_path):
    columns = {
        "map": pa.array([[("key", "value")]] * 5, type=pa.map_(pa.string(), pa.string())),
        "decimal": pa.array([Decimal("1.5")] * 5),
        "gaps": pa.array([None, "a", None, "b", "c"]),
        "nothing": pa.nulls(5),
        "list": pa.array([["x"], None, [], ["y", None], ["z"]]),
        "lists": pa.array([[["x"]]] * 5),
        "record": pa.array([{"text": "a", "number": 1}] * 5),
        "pair": pa.array([["a", "b"]] * 5, pa.list_(pa.string(), 2)),
        "bytes": pa.array([b"1"] * 5),
    }
    write_table(pa.table(columns), tmp_path / "own.parquet")
    check_parquet(tmp_path / "own.parquet", name="own")


@pytest.mark.parametrize("column", ["map", "list", "pair", "record"])
def test_texts_are_counted_wherever_they_are(tmp_path, monkeypatch, column):
    """1,000 rows of one text of 5,000 bytes."""
    monkeypatch.setattr(parquet_checks, "_ALWAYS_ALLOWED", 4_900_000)
    rows = {
        "map": pa.array([[("key", LONG[:5000])]] * 1000, type=pa.map_(pa.string(), pa.string())),
        "list": pa.array([[LONG[:5000]]] * 1000),
        "pair": pa.array([[LONG[:2500]] * 2] * 1000, pa.list_(pa.string(), 2)),
        "record": pa.array([{"text": LONG[:5000]}] * 1000),
    }
    write_table(pa.table({"text": rows[column]}), tmp_path / "own.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"stands for more than 4,900,000, as no text does\. Do not use it"):
        check_parquet(tmp_path / "own.parquet", name="own")
    monkeypatch.setattr(parquet_checks, "_ALWAYS_ALLOWED", 5_100_000)
    check_parquet(tmp_path / "own.parquet", name="own")


def test_parquet_gives_the_tokens_of_its_texts(tmp_path, tokenizer):
    """More rows than are read at once."""
    texts = [f"{number} words of a text" for number in range(2500)]
    write_table(pa.table({"text": texts}), tmp_path / "own.parquet")
    expected = [token for text in texts for token in (*ids_of(text, tokenizer=tokenizer), tokenizer.eos_token_id)]
    assert stream_of(tmp_path / "own.parquet", tokenizer=tokenizer) == expected


def test_documents_of_usual_length_are_tokenised_whole(tmp_path, tokenizer):
    texts = [STORY, "a", STORY * 20, "b c " * 30_000]
    expected = [token for text in texts for token in (*ids_of(text, tokenizer=tokenizer), tokenizer.eos_token_id)]
    assert stream_of(save(tmp_path, texts), tokenizer=tokenizer) == expected
    assert all(list(pieces(text, tokenize=None)) == [Piece(text=text)] for text in texts)


@pytest.mark.parametrize("longest", [300, 700, 1999])
def test_a_long_document_has_the_tokens_of_the_whole(tmp_path, tokenizer, monkeypatch, longest):
    monkeypatch.setattr(long_texts, "LONGEST", longest)
    texts = [STORY, "short", STORY[::-1], "x " * 3000]
    expected = [token for text in texts for token in (*ids_of(text, tokenizer=tokenizer), tokenizer.eos_token_id)]
    assert stream_of(save(tmp_path, texts), tokenizer=tokenizer) == expected


@pytest.mark.parametrize("format", ["messages", "instruction"])
def test_long_conversations_and_instructions_have_the_tokens_of_the_whole(tmp_path, monkeypatch, format):
    tokenizer = load_tokenizer("asset:small_moe")
    records = [{"messages": talk(STORY), "instruction": STORY, "input": None, "output": STORY}] * 3
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def rows():
        corpus = Corpus(source=str(tmp_path / "own.jsonl"), format=format)
        rows = corpus_rows(corpus, name="own", tokenizer=tokenizer, sequence_length=10_000, keep_last=True)
        return [(row["input_ids"].tolist(), row["labels"].tolist()) for row in rows]

    expected = rows()
    monkeypatch.setattr(long_texts, "LONGEST", 500)
    assert rows() == expected


class Spy:
    """A tokenizer that notes the length of what it is given at once."""

    def __init__(self, tokenizer):
        self.tokenizer, self.lengths = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **settings):
        self.lengths.append(len(texts) if isinstance(texts, str) else sum(map(len, texts)))
        return self.tokenizer(texts, **settings)


def test_a_tokenizer_never_sees_more_than_so_much_at_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(long_texts, "LONGEST", 2000)
    spy = Spy(tokenizer)
    stream = stream_of(save(tmp_path, [STORY, "x" * 5000, *[STORY[:1500]] * 9]), tokenizer=spy)
    assert max(spy.lengths) < 4000
    assert len(stream) > 2000


def test_what_is_beyond_the_wanted_tokens_is_not_tokenised(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(long_texts, "LONGEST", 2000)
    spy = Spy(tokenizer)
    text = STORY * 50
    stream = stream_of(save(tmp_path, [text]), tokenizer=spy, max_tokens=100)
    assert stream == ids_of(text, tokenizer=tokenizer)[:100]
    assert sum(spy.lengths) < 10_000 < len(text)


def test_a_text_without_spaces_is_cut_anywhere_and_none_of_it_lost(monkeypatch):
    monkeypatch.setattr(long_texts, "LONGEST", 100)
    found = list(pieces("x" * 1050, tokenize=lambda text: [len(text)]))
    assert "".join(piece.text for piece in found) == "x" * 1050
    assert [piece.begins for piece in found] == [True] + [False] * 10
    assert [piece.ends for piece in found] == [False] * 10 + [True]


def test_texts_are_tokenised_many_at_once():
    assert [len(batch) for batch in batches(Piece(text="a") for _ in range(600))] == [256, 256, 88]
