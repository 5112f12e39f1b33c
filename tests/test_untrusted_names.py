"""Names from files on pages, cards and terminals: text, whatever they hold."""

from html.parser import HTMLParser

import pytest
from comparison_rows import dense_row, make_row
from statistics_factory import make_statistics

from lightning_moe.allocation import build_method
from lightning_moe.export.manifest import CARD_NAME, Manifest, PlanOrigin
from lightning_moe.export.model_card import told_of_card, write_card
from lightning_moe.records import PrunePlan
from lightning_moe.reporting.figures.style import new_figure
from lightning_moe.reporting.report import write_report
from lightning_moe.reporting.table import Column, escape_markdown, format_markdown, format_table

EVIL = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>&<a href=javascript:alert(3)>"
FIELDS = {"source": "owner/model", "versions": {}, "stored_params": 8, "active_params": 8.0, "dropped": ()}
FIELDS |= {"bits": dict.fromkeys(("experts", "linears", "embeddings"), 16), "files": {}, "bytes": 0}


class Tags(HTMLParser):
    """Elements and attributes of a page, and what is text."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links = [value for name, value in attrs if name in ("href", "src")]
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in self.links)

    def handle_data(self, data):
        self.text.append(data)


def tags_of(page):
    found = Tags()
    found.feed(page)
    return found


def evil_plan(statistics):
    plan = build_method("reap").plan(statistics, prune_ratio=0.5)
    own = {"shape": plan.shape, "prune_ratio": 0.5, "align": 1, "keep": plan.keep}
    return PrunePlan(method=EVIL, provenance={EVIL: EVIL}, **own)


def test_a_page_runs_no_script_of_a_name(tmp_path):
    statistics = make_statistics(corpora=(EVIL, "code"))
    losses = {"nll_per_corpus": {EVIL: 2.1}, "tasks": {EVIL: {"acc": 0.5, "stderr": 0.1}}}
    rows = [dense_row(**losses), make_row(EVIL, 0.1, name=EVIL, budget=EVIL, export=EVIL, **losses)]
    summary = {
        "dense": {"nll": 2.0, "bytes": 10},
        "stages": [{"name": f"cut_{EVIL}", "prune_ratio": 0.5, "nll": 2.5, "bytes": 5, "nll_per_corpus": {EVIL: 2.5}}],
        "control": {"nll": 2.2},
        "exports": [{"path": EVIL, "format": EVIL, "bytes": 5}],
        "recovery": {"gap_closed_percent": {EVIL: 50.0}},
        "versions": {EVIL: EVIL},
    }
    cell = {"method": EVIL, "size": 1, "evaluation": EVIL, "loss_above_dense": 0.1, "variant": False}
    corpora = (EVIL, *"abcdefgh")  # a figure wide enough for the long name
    matrix = [cell | {"calibration": one, "evaluation": other} for one in corpora for other in corpora]
    file = write_report(
        tmp_path,
        title=EVIL,
        summary=summary,
        rows=rows,
        matrix=matrix + [row | {"variant": True} for row in matrix],
        plans={EVIL: evil_plan(statistics)},
        statistics=statistics,
        routing={EVIL: {EVIL: [0.5]}, f"after {EVIL}": {EVIL: [0.5]}},
    )
    page = file.read_text(encoding="utf-8")
    found = tags_of(page)
    known = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "nav", "ul", "li", "a", "section", "p"}
    assert found.tags <= known | {"figure", "img", "figcaption", "div", "table", "thead", "tbody", "tr", "th", "td"} | {
        "details",
        "summary",
    }
    assert not {name for name in found.attributes if name.startswith("on")}
    assert "".join(found.text).count("alert(1)") > 10  # the names are there, as text
    assert "default-src 'none'" in page


def test_half_characters_do_not_stop_a_page(tmp_path):
    rows = [dense_row(), make_row("a\ud800b", 0.1, name="\udfff")]
    text = write_report(tmp_path, title="t", rows=rows).read_text(encoding="utf-8")
    assert "\ud800" not in text


def card_of(folder, **fields):
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    origin = PlanOrigin(digest="0", method=EVIL, prune_ratio=0.5, corpora=EVIL, statistics="")
    values = FIELDS | {"format": "ragged", "base_model": "owner/model", "plans": (origin,), "max_logit_diff": None}
    write_card(
        folder, manifest=Manifest(**(values | fields)), results=[dense_row(name=EVIL, nll_per_corpus={EVIL: 2.0})]
    )
    return (folder / CARD_NAME).read_text(encoding="utf-8")


def body_of(card):
    return "\n".join(line for line in card.splitlines() if not line.startswith("<!-- lightning_moe"))


def test_a_card_holds_no_html_and_no_headings_of_a_name(tmp_path):
    card = card_of(tmp_path, base_model=f"owner/{EVIL}\n## Heading\n---\nlicense: evil")
    body = body_of(card)
    titles = [line for line in body.splitlines() if line.startswith("#") and "import" not in line]
    assert [title for title in titles if title.startswith("## ")] == [
        "## What was cut",
        "## How to load it",
        "## Sizes",
        "## Results",
        "## Where it comes from",
    ]
    assert len(titles) == 6  # and the title of the page
    outside_code = "".join(body.split("`")[::2])
    assert "<" not in outside_code
    assert "license" not in body.split("\n---\n")[0]


def test_markdown_of_a_name_is_text():
    assert escape_markdown("[x](http://e) `a` <b> | \\|\n# h") == "\\[x\\](http://e) 'a' &lt;b&gt; \\| \\\\\\| # h"
    table = format_markdown([{"a": "x|y\\|z"}], columns=(Column(key="a", header="h|i\nj", left=True),))
    assert table.splitlines() == ["| h\\|i j    |", "| --------- |", "| x\\|y\\\\\\|z |"]


def test_headers_of_a_terminal_stay_in_their_line():
    text = format_table([{"a": "\x1b[2Jb"}], columns=(Column(key="a", header="c\nd\x1b[31m", left=True),))
    assert text.splitlines() == ["c d [31m", "--------", "[2Jb"]


def test_a_card_of_other_letters_is_a_person_s(tmp_path):
    (tmp_path / CARD_NAME).write_bytes("Ein Modell für alle".encode("latin-1"))
    assert told_of_card(tmp_path) == [f"{tmp_path / CARD_NAME} was written or edited by a person and stays as it was"]


@pytest.mark.parametrize("card", [b"---\n- a\n- b\n---\n", b"---\na: [\n---\n", b"---\nlicense: \xff\n---\n"])
def test_a_source_s_damaged_card_says_no_licence(tmp_path, caplog, card):
    source, export = tmp_path / "source", tmp_path / "export"
    source.mkdir()
    export.mkdir()
    (source / CARD_NAME).write_bytes(card)
    assert "license" not in card_of(export, source=str(source)).split("\n---\n")[0]
    assert f"The licence of '{source / CARD_NAME}' is not carried over" in caplog.text


def test_a_figure_has_no_more_pixels_than_memory_holds():
    with pytest.raises(ValueError, match=r"A figure of 9 x 100000 inches is too large for a page \(`report`\)"):
        new_figure(height=1e5)
