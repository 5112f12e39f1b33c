"""The scripts that make the shipped text and tokenizer."""

import hashlib
import json

import pytest

from lightning_moe.assets import asset_path
from scripts.build_text import (
    FOREIGN_SPLITS,
    GLOSSES_PER_DOCUMENT,
    SHIPPED_SPLITS,
    Document,
    assign,
    code,
    distinct,
    french,
    glosses,
    math,
    write_jsonl,
)
from scripts.train_tokenizer import sample, train

SET_MM = """
$( This is $t not typesetting, but a comment
   of two lines.  (Contributed by NM, 5-Aug-1993.) $)
wph $f wff ph $.
$( $t htmldef "(" as "("; $)
${
  mp2.1 $e |- ph $.
  $( A double
     modus ponens.  (Contributed by NM, 5-Apr-1994.)  (Proof shortened by W. L., 1-May-2013.) $)
  mp2 $p |- ( ph ->
     ps ) $=
    ( wi ax-mp ) ABCFDABCGEHI $.
$}
$( #*#*#*#
   Axioms
   #*#*#*# $)
ax-1 $a |- ( ph -> ( ps -> ph ) ) $.
"""

SYNSET = (
    "00597915 31 v 02 learn 0 larn(ip) 0 002 + 05752544 n 0302 + 05637558 n 0304 02 + 08 00 + 22 00 "
    '| gain knowledge or skills; "She learned dancing"  '
)


PAGE = """<html><body><div id="page-header"><p class="menu"><a href="x">Modules</a> | FAQ</p></div>
<div id="page-content"><h1>Le guide</h1><div class="toplang"><p><span>Langues</span></p></div>
<p>Ce document compl&egrave;te la <code>documentation</code>
   de r&eacute;f&eacute;rence pour le serveur.</p><ul><li>Point</li></ul><pre>Listen 80</pre><p>Voir le reste.</p></div>
<div id="footer"><p class="apache">Copyright</p></div></body></html>"""


def documents(count, *, length=1000):
    return [Document(id=f"d/{index}", text=f"{index} " * length) for index in range(count)]


def test_math_keeps_comment_hypothesis_and_formula_and_drops_proof_and_typesetting(tmp_path):
    path = tmp_path / "usr/share/metamath/databases/set.mm"
    path.parent.mkdir(parents=True)
    path.write_text(SET_MM)
    (document,) = math(tmp_path)
    assert document.text.splitlines() == [
        "$( This is $t not typesetting, but a comment of two lines. $)",
        "mp2.1 $e |- ph $.",
        "$( A double modus ponens. $)",
        "mp2 $p |- ( ph -> ps ) $.",
        "$( Axioms $)",
        "ax-1 $a |- ( ph -> ( ps -> ph ) ) $.",
    ]


def test_glosses_name_all_words_of_a_sense(tmp_path):
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    for part in ("noun", "adj", "adv"):
        (folder / f"data.{part}").write_text("  1 The licence stands at the head of the file\n")
    (folder / "data.verb").write_text("  1 licence\n" + (SYNSET + "\n") * (GLOSSES_PER_DOCUMENT + 1))
    first, second = glosses(tmp_path)
    assert first.text.count("\n") == GLOSSES_PER_DOCUMENT
    assert second.text == 'verb learn, larn: gain knowledge or skills; "She learned dancing"\n'
    assert second.id == f"glosses/verb/{GLOSSES_PER_DOCUMENT}"


def test_code_leaves_out_tests_and_tables(tmp_path):
    ids = [document.id for document in code(tmp_path)]
    assert "code/argparse.py" in ids
    assert not any("/test/" in name or "encodings" in name or "site-packages" in name for name in ids)


def test_french_keeps_title_and_paragraphs_of_translated_pages(tmp_path):
    folder = tmp_path / "usr/share/doc/apache2-doc/manual/fr"
    (folder / "mod").mkdir(parents=True)
    (folder / "mod/guide.html").write_text(PAGE, encoding="utf-8")
    (folder / "other.html").write_text("<h1>Guide</h1><p>See the rest of the manual.</p>", encoding="utf-8")
    (document,) = french(tmp_path)
    assert document.id == "french/mod/guide"
    expected = ["Le guide", "Ce document complète la documentation de référence pour le serveur.", "Voir le reste."]
    assert document.text.split("\n\n") == [*expected[:2], expected[2] + "\n"]


def test_a_foreign_domain_has_its_own_splits():
    splits = assign(documents(200), shipped=FOREIGN_SPLITS)
    assert list(splits) == ["heldout", "calibration", "train"]
    assert all(sum(len(one.text) for one in splits[split.name]) >= split.size for split in FOREIGN_SPLITS)


@pytest.mark.parametrize("domain", ["speeches", "glosses", "code", "math", "manual", "french"])
def test_shipped_splits_share_no_document(domain):
    read = {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in asset_path(f"text/{domain}").glob("*.jsonl")
    }
    assert {"heldout", "calibration"} <= set(read)
    ids = [one["id"] for split in read.values() for one in split]
    assert len(ids) == len(set(ids))
    assert all(one["id"].startswith(f"{domain}/") and one["text"].strip() for split in read.values() for one in split)


def test_whole_documents_go_to_one_split_by_the_hash_of_their_id():
    given = documents(600)
    splits = assign(given)
    ids = [document.id for part in splits.values() for document in part]
    assert sorted(ids) == sorted(document.id for document in given)
    assert ids == sorted(ids, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert splits == assign(given[::-1])
    for split in SHIPPED_SPLITS:
        size = sum(len(document.text.encode()) for document in splits[split.name])
        assert split.size <= size < split.size + split.longest
    assert splits["train"]


def test_long_documents_are_cut_where_they_are_shipped_only():
    splits = assign(documents(100, length=40_000))
    assert {len(document.text) for document in splits["heldout"]} == {8_000}
    assert {len(document.text) for document in splits["recovery"]} == {30_000}
    assert min(len(document.text) for document in splits["train"]) >= 80_000


def test_repeated_and_tiny_documents_are_dropped():
    text = "word " * 100
    given = [Document(id="a", text=text), Document(id="b", text=text + "\n"), Document(id="c", text="short")]
    assert [document.id for document in distinct(given)] == ["a"]


def test_tokenizer_learns_from_equal_shares(tmp_path):
    for domain, word in (("one", "alpha "), ("two", "beta ")):
        write_jsonl(tmp_path / domain / "train.jsonl", documents=[Document(id=word, text=word * 500)] * 3)
    assert [len(text) for text in sample(tmp_path, characters=4000)] == [3000, 1000, 2500, 1500]
    assert json.loads((tmp_path / "one/train.jsonl").read_text().splitlines()[0])["id"] == "alpha "
    tokenizer = train(sample(tmp_path, characters=4000))
    ids = tokenizer("alpha beta 12<|endoftext|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["1", "2", "<|endoftext|>"]
    assert tokenizer.decode(ids) == "alpha beta 12<|endoftext|>"
