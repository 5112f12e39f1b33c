"""The command `report` over a folder of results, and the section of the matrix."""

import json
import re

import pytest
from comparison_rows import dense_row, make_row
from statistics_factory import make_statistics

from callbacks import RouterMonitor
from callbacks.report import _routing
from lightning_moe.allocation import build_method
from lightning_moe.cli import main
from lightning_moe.evaluation.routing import LayerRouting, RoutingTable
from lightning_moe.reporting.page import Block, contents
from lightning_moe.reporting.sections.matrix import matrix_block

CORPORA = ("code", "math")


def matrix_rows():
    """0.1 on the same corpus, 0.3 on another, 0.2 from both; half a tenth more from little text."""
    rows = [cell("dense", calibration=None, size=0, evaluation=corpus, loss=0.0) for corpus in CORPORA]
    for calibration in (*CORPORA, "all"):
        for evaluation in CORPORA:
            loss = 0.2 if calibration == "all" else 0.1 if calibration == evaluation else 0.3
            rows += [
                cell("reap", calibration=calibration, size=size, evaluation=evaluation, loss=loss + extra)
                for size, extra in ((100, 0.05), (200, 0.0))
            ]
    tried = [cell("paper_a log", calibration="all", size=200, evaluation=corpus, loss=0.4) for corpus in CORPORA]
    return rows + [row | {"variant": True} for row in tried]


def cell(method, *, calibration, size, evaluation, loss):
    row = {"method": method, "settings": {}, "ratio": 0.5, "calibration": calibration, "size": size}
    return row | {"evaluation": evaluation, "nll": 2 + loss, "loss_above_dense": loss, "variant": False}


def table_of(step, entropy):
    layer = LayerRouting(entropy=entropy, load=(0.5, 0.5), evicted=(), num_tokens=8)
    return RoutingTable(step=step, corpora={"code": (layer,)})


@pytest.fixture
def folder(tmp_path):
    """Everything that the other commands may have left."""
    statistics = make_statistics(corpora=CORPORA)
    statistics.save(tmp_path / "statistics.safetensors")
    rows = [dense_row(), make_row("exact_global", 0.1, name="a"), make_row("reap", 0.3, name="b")]
    for name, method in (("a", "exact_global"), ("b", "reap")):
        build_method(method).plan(statistics, prune_ratio=0.5).save(tmp_path / "plans" / f"{name}.json")
    (tmp_path / "stages").mkdir()
    for row in rows:
        text = json.dumps(row | {"prune_ratio": row["ratio"]})
        (tmp_path / "stages" / f"{row['name']}.json").write_text(text)
    (tmp_path / "compare.json").write_text(json.dumps(rows))
    (tmp_path / "matrix.json").write_text(json.dumps(matrix_rows()))
    tables = {"before": table_of(0, 0.7).to_dict(), "after": table_of(9, 0.6).to_dict()}
    (tmp_path / "monitor").mkdir()
    (tmp_path / "monitor" / "router.json").write_text(json.dumps(tables))
    return tmp_path


def page_of(folder):
    return (folder / "report" / "report.html").read_text(encoding="utf-8")


def figures_of(folder):
    return {file.stem for file in (folder / "report" / "report_figures").iterdir()}


def test_the_page_holds_every_figure_of_a_full_folder(folder):
    after = ["--statistics_after", str(folder / "statistics.safetensors")]
    main(["report", "--folder", str(folder), *after])
    plans = {f"plan_{index}_{name}" for index in (0, 1) for name in ("widths", "weights", "experts", "curves", "usage")}
    worth = {"expert_scores", "concentration", "cut_cost", "smoothings"}
    routers = {"entropy_depth", "entropy", "activations", "routing"}
    assert figures_of(folder) == {"pareto", "retention", "matrix_0", *plans, *worth, *routers}
    text = page_of(folder)
    titles = [
        "In short",
        "Methods compared",
        "Which text to calibrate on",
        "What was cut",
        "What experts and channels are worth",
        "Routers and activations",
    ]
    assert re.findall(r"<h2>(.*?)</h2>", text) == titles
    assert [name for name in titles if f'href="#{name.lower().replace(" ", "-")}"' in text] == titles
    # The comparison's rows are not listed once more; every figure has its sentence; the page stays small.
    assert "<h2>Results</h2>" not in text
    assert text.count("<figcaption>") == len(figures_of(folder))
    assert len(text) < 5_000_000
    assert "prefers-color-scheme: dark" in text


def test_rows_beside_the_comparison_keep_their_table(folder):
    other = {"name": "recovered_50", "prune_ratio": 0.5, "nll": 2.05}
    (folder / "stages" / "recovered_50.json").write_text(json.dumps(other))
    main(["report", "--folder", str(folder)])
    results = page_of(folder).split("<h2>Results</h2>")[1].split("<h2>")[0]
    assert "recovered_50" in results
    assert ">a<" not in results


def test_a_folder_of_a_matrix_alone_has_a_page(tmp_path):
    (tmp_path / "matrix.json").write_text(json.dumps(matrix_rows()))
    main(["report", "--folder", str(tmp_path)])
    assert figures_of(tmp_path) == {"matrix_0"}
    assert not (tmp_path / "summary.json").exists()


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", "--folder", str(tmp_path)])
    assert "There are no rows of results below" in capsys.readouterr().err


def test_the_matrix_in_words_figures_and_settings():
    block = matrix_block(matrix_rows())
    html = block.html()
    assert (
        "reap, 200 tokens: 0.1000 nats per token above dense where the text is the one calibrated on, 0.3000 on "
        "another corpus; calibrated on several corpora: 0.2000 (all)." in html
    )
    assert [picture.name for picture in block.pictures] == ["matrix_0"]
    assert "<td>0.4000</td>" in html


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, "Row 0 of the matrix must be a mapping, got int"),
        ({"method": "reap"}, "Row 0 of the matrix needs 'evaluation', a text, got None"),
        ({"method": "reap", "evaluation": "code", "size": "x"}, "'size' of Row 0 of the matrix must be a number"),
    ],
)
def test_broken_rows_of_a_matrix_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        matrix_block([row])


def test_the_callback_takes_the_tables_of_a_router_monitor():
    class WithCallbacks:
        def __init__(self, *callbacks):
            self.callbacks = list(callbacks)

    monitor = RouterMonitor(folder="unused")
    assert _routing(WithCallbacks()) is None
    assert _routing(WithCallbacks(monitor)) is None
    monitor.before, monitor.after = table_of(0, 0.7), table_of(9, 0.6)
    assert _routing(WithCallbacks(monitor)) == {"before (step 0)": {"code": [0.7]}, "after (step 9)": {"code": [0.6]}}


def test_contents_lead_to_the_sections():
    block = Block(title="What was cut", parts=["<p>x</p>"])
    assert 'id="what-was-cut"' in block.html()
    assert '<a href="#what-was-cut">What was cut</a>' in contents([block])
