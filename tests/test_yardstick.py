"""The yardstick: each measure on a few lines whose figure is counted by hand."""

import json

import pytest
import yardstick
from measures.habits import measure_habits
from measures.lengths import code_lines, measure_functions
from measures.raises import measure_raises
from measures.repeats import measure_repeats, repeated
from measures.signatures import measure_signatures
from measures.source import ROOT, Measured, Source
from measures.unread import unread

pytestmark = pytest.mark.docs

SIX = "a = first()\nb = second(a)\nc = third(b)\nd = fourth(c)\ne = fifth(d)\nf = sixth(e)\n"


def source(text: str, *, name: str = "lightning_moe/example.py") -> Source:
    return Source(path=ROOT / name, text=text)


def measured(rows: list[Measured], name: str) -> Measured:
    (row,) = [row for row in rows if row.name == name]
    return row


def signature(text: str, name: str) -> Measured:
    return measured(measure_signatures([source(text)]), name)


def message(raised: str, *, pattern: str) -> list[str]:
    """Values of (carries a value, is tested) for one raise and one `match=`."""
    library = source(f"def check(width):\n    raise ValueError({raised})\n")
    test = source(
        f"def test():\n    with raises(ValueError, match={pattern!r}):\n        check(3)\n", name="tests/t.py"
    )
    return [row.value.split()[0] for row in measure_raises([library], tests=[test])]


def test_what_nothing_reads_is_named() -> None:
    one = source("log = 1\nLIMIT = 2\ndef _twice(n): return _twice(n)\ndef once(): return LIMIT\n", name="a.py")
    two = source(
        "from a import once\n@dataclass\nclass Row: ...\nclass Kept: ...\n__all__ = ['Kept', 'once']\n", name="b.py"
    )
    assert unread([one, two]) == [
        ("log", "a.py:1 log"),
        ("_twice", "a.py:3 _twice"),
        ("Row", "b.py:3 Row"),
    ]


def test_a_key_that_a_message_names_too_is_not_looked_for_in_it() -> None:
    raised = "f'`attention_mask` must be [B, S], got {width}.'"
    assert message(raised, pattern="attention_mask")[1] == "0.0"
    assert message(raised, pattern="`attention_mask` must be")[1] == "100.0"


def test_a_function_is_counted_without_its_docstring() -> None:
    (node,) = source('def f(a):\n    """One.\n\n    Two.\n    """\n    b = a\n    return b\n').functions
    assert code_lines(node) == 3  # def, b, return


def test_the_longest_function_is_shown_with_its_docstring_too() -> None:
    docs = "".join(f"    line {number}\n" for number in range(60))
    long = source(f'def f(a):\n    """One.\n\n{docs}    """\n    return a\n', name="callbacks/example.py")
    hook = source("class A:\n    @override\n    def on_fit(self): ...\n", name="callbacks/other.py")
    row = measured(measure_functions([long, hook], beside=[hook]), "longest function (library)")
    assert (row.value, row.holds) == ("2 lines (65 with docstring)", True)


def test_an_argument_without_annotation_is_named() -> None:
    row = signature("def f(a: int, b) -> None: ...", "annotations")
    assert row.value == "66.7 % (2 of 3)"  # a, b and what it returns
    assert row.offenders == ("lightning_moe/example.py:1 f: b",)
    assert not row.holds


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ('def f(hidden: Tensor) -> None:\n    """Doubles."""', False),
        ('def f(hidden: Tensor) -> None:\n    """Doubles `hidden` [T, H]."""', True),
        ('def f(hidden_TH: Tensor) -> None:\n    """Doubles."""', True),
        ('def f(hidden_TH: Tensor) -> Tensor:\n    """Doubles."""', False),
        ('def f(hidden_TH: Tensor) -> Tensor:\n    """Doubles, in the same shape."""', True),
    ],
)
def test_a_function_on_tensors_says_their_shapes(text: str, holds: bool) -> None:
    assert signature(text, "functions on tensors that say their shapes").holds is holds


@pytest.mark.parametrize(
    ("text", "unsaid"),
    [
        ("# T tokens, H hidden\nx_TH = 1\n", ()),
        ('"""Rows.  T tokens."""\nx_TH = 1\n', ("lightning_moe/example.py H",)),
        ("X_MOST = 1\nname_of = 2\n", ()),
    ],
)
def test_letters_of_shapes_are_explained(text: str, unsaid: tuple[str, ...]) -> None:
    assert signature(text, "files with shape suffixes that explain them").offenders == unsaid


@pytest.mark.parametrize(
    ("raised", "pattern", "expected"),
    [
        ('f"`width` must be above 0, got {width}."', "`width` must be above 0, got 3", ["100.0", "100.0"]),
        ('f"`width` must be above 0, got {width}."', r"must be above 0, got -?\d+\.", ["100.0", "100.0"]),
        ('f"`width` must be above 0, got {width}."', "`width` must be .* got 3", ["100.0", "100.0"]),
        ('f"`width` must be above 0, got {width}."', "`width` must be below 0, got 3", ["100.0", "0.0"]),
        ('f"`width` must be above 0, got {width}."', "must be", ["100.0", "0.0"]),
        ('"`width` must be above 0."', "`width` must be above 0", ["0.0", "100.0"]),
        ('"Experts need a width, got none."', "Experts need a width", ["100.0", "100.0"]),
    ],
)
def test_a_message_carries_its_value_and_is_tested(raised: str, pattern: str, expected: list[str]) -> None:
    assert message(raised, pattern=pattern) == expected


def test_six_equal_lines_are_found_and_five_are_not() -> None:
    one, other = source(SIX, name="lightning_moe/one.py"), source(f"z = 0\n{SIX}", name="lightning_moe/other.py")
    assert repeated([one, other]) == ["lightning_moe/one.py:1 = lightning_moe/other.py:2 (6 lines) a = first()"]
    five = source(SIX.replace("third", "another"), name="lightning_moe/other.py")
    assert repeated([one, five]) == []


def test_a_script_that_repeats_the_library_is_found() -> None:
    rows = measure_repeats([source(SIX)], beside=[source(SIX, name="scripts/other.py")])
    assert [row.value for row in rows] == ["0", "1"]


def test_signatures_and_comments_are_no_repeated_code() -> None:
    arguments = "".join(f"    {name}: int,\n" for name in "abcdefgh")
    assert repeated([source(f"def f(\n{arguments}):\n    return a\n\n\ndef g(\n{arguments}):\n    return b\n")]) == []
    commented = SIX.replace("\n", "\n# why\n\n")
    assert len(repeated([source(SIX), source(commented, name="lightning_moe/other.py")])) == 1


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("getattr(model, 'experts', None)", "guesses: hasattr, getattr with a default"),
        ("hasattr(model, 'experts')", "guesses: hasattr, getattr with a default"),
        ("print(1)", "print, pickle, basicConfig below the command line"),
        ("from pickle import loads", "print, pickle, basicConfig below the command line"),
        ("try:\n    f()\nexcept (KeyError, Exception):\n    pass", "handlers of every exception"),
        ("try:\n    f()\nexcept:\n    pass", "handlers of every exception"),
    ],
)
def test_what_the_library_never_does_is_found(line: str, name: str) -> None:
    test = source("assert True\n", name="tests/t.py")
    assert measured(measure_habits([source(line)], tests=[test]), name).value == "1"
    allowed = source(
        "getattr(config, 'width')\nfrom pickle import UnpicklingError\ntry:\n    f()\nexcept KeyError: ...\n"
    )
    assert measured(measure_habits([allowed], tests=[test]), name).value == "0"


def test_look_ups_that_guess_are_shown() -> None:
    guesses = "vars(model).get('experts')\nrouter.__dict__.pop('top_k', 0)\n"
    library = source(f"{guesses}vars(config)['width']\nvars(config).pop('width')\n")
    row = measured(measure_habits([library], tests=[source("assert 1\n")]), "look-ups in vars() with a default")
    assert (row.value, row.holds, len(row.offenders)) == ("2", True, 2)


def test_messages_that_are_made_elsewhere_are_counted_as_not_judged() -> None:
    library = source("def f(why):\n    raise ValueError(why)\n")
    assert measure_raises([library], tests=[])[0].value == "0.0 % (0 of 0); 1 not judged"


def test_the_size_of_the_tests_counts_what_proves() -> None:
    tests = [source("assert f()\nassert_close(a, b)\nwith pytest.raises(ValueError, match='x'):\n    f()\n")]
    rows = measure_habits([source("a = 1\n" * 5)], tests=tests)
    assert measured(rows, "lines of tests to lines of library").value == "4 : 5"
    assert not measured(rows, "lines of tests to lines of library").holds
    assert measured(rows, "asserts per 100 lines of tests").value == "75.0 (3)"


def test_the_table_names_places_and_the_exit_code_says_it(monkeypatch, tmp_path, capsys) -> None:
    good = Measured(name="files", value="3 lines", target="<= 4", holds=True, offenders=("shown nowhere",))
    bad = Measured(name="raises", value="2", target="0", holds=False, offenders=("a.py:1", "b.py:2", "c.py:3"))
    monkeypatch.setattr(yardstick, "measure", lambda: [good, bad])
    assert yardstick.main(["--offenders", "2", "--json", str(tmp_path / "rows.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "ok      files   3 lines  <= 4",
        "BROKEN  raises        2  0",
        "          a.py:1",
        "          b.py:2",
        "          and 1 more",
    ]
    assert json.loads((tmp_path / "rows.json").read_text())[1]["offenders"] == ["a.py:1", "b.py:2", "c.py:3"]
    monkeypatch.setattr(yardstick, "measure", lambda: [good])
    assert yardstick.main([]) == 0
