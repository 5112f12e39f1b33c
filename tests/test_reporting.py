"""Tables by their exact text, sentences, and the page as a browser gets it."""

import base64
import math
import re

import pytest
import torch
from statistics_factory import make_statistics, shape_of

from lightning_moe.allocation import build_method
from lightning_moe.records import PrunePlan
from lightning_moe.reporting import (
    Column,
    Summary,
    format_markdown,
    format_table,
    headlines,
    plan_in_words,
    summary_table,
    write_report,
)
from lightning_moe.reporting.words import enumerate_words, layer_labels

PNG_START = b"\x89PNG\r\n\x1a\n"


def small_summary():
    return {
        "dense": {"nll": 2.0, "bytes": 8_000_000, "stored_params": 4000, "active_params": 1500},
        "stages": [
            {
                "name": "cut_50",
                "prune_ratio": 0.5,
                "nll": 2.05,
                "bytes": 4_000_000,
                "stored_params": 2000,
                "seconds": 3,
            },
            {"name": "paper_a_50", "prune_ratio": 0.5, "nll": 2.2, "bytes": 4_000_000, "stored_params": 2000},
        ],
        "control": {"nll": 1.98},
        "exports": [
            {
                "path": "out/a",
                "format": "nf4",
                "bytes": 2_000_000,
                "max_logit_diff": 0.34,
                "median_logit_diff": 1.2e-6,
                "rerouted": 1 / 64,
            }
        ],
    }


def hand_plan(*, keep, shape, method="by_hand", prune_ratio=0.5):
    masks = tuple(torch.tensor(mask, dtype=torch.bool) for mask in keep)
    return PrunePlan(shape=shape, method=method, prune_ratio=prune_ratio, align=1, keep=masks, provenance={})


def report(folder, *, title="A run", summary=None, plans=None, statistics=None):
    return write_report(folder, title=title, summary=summary, plans=plans, statistics=statistics)


COLUMNS = (
    Column(key="name", header="name", left=True),
    Column(key="loss", header="loss", text="{:.2f}".format),
)


def test_a_table_is_aligned_and_absent_values_are_dashes():
    rows = [{"name": "long name", "loss": 10.5}, {"name": "b"}, {"name": "c", "loss": math.nan}]
    assert format_table(rows, columns=COLUMNS) == (
        "name        loss\n---------  -----\nlong name  10.50\nb              -\nc            nan"
    )


def test_markdown_is_aligned_and_bars_are_escaped():
    rows = [{"name": "a|b", "loss": 1.0}]
    assert format_markdown(rows, columns=COLUMNS) == ("| name | loss |\n| ---- | ---: |\n| a\\|b | 1.00 |")


def test_a_cell_never_breaks_a_line_or_steers_a_terminal():
    table = format_table([{"name": "a\nb\x1b[31m"}], columns=COLUMNS[:1])
    assert table == "name\n--------\na b [31m"


def test_a_table_without_columns_is_refused():
    with pytest.raises(ValueError, match="at least one column, got none"):
        format_table([], columns=())


def test_summary_table_by_its_text():
    # 2.05 - 2 = +0.05; 8 MB / 4 MB = 2.00 times smaller; the export 8 / 2 = 4.00.
    expected = """\
name        prune ratio  keep ratio  NLL (nats/token)  loss above dense    MB  x smaller  stored params  active params  seconds
----------  -----------  ----------  ----------------  ----------------  ----  ---------  -------------  -------------  -------
dense              0.00        1.00            2.0000                 -  8.00       1.00          4,000          1,500        -
cut_50             0.50        0.50            2.0500           +0.0500  4.00       2.00          2,000              -      3.0
paper_a_50         0.50        0.50            2.2000           +0.2000  4.00       2.00          2,000              -        -
control            0.00        1.00            1.9800           -0.0200     -          -              -              -        -

export  format    MB  x smaller  max logit diff   median  rerouted
------  ------  ----  ---------  --------------  -------  --------
out/a   nf4     2.00       4.00            0.34  1.2e-06      1.6%"""  # noqa: E501
    assert summary_table(small_summary()) == expected


def test_summary_table_as_markdown_and_without_exports():
    text = summary_table({"dense": {"nll": 2.0}}, markdown=True)
    header, rule, row = text.splitlines()
    assert header.startswith("| name  | prune ratio |")
    assert rule.startswith("| ----- | ----------: |")
    assert row.split("|")[4].strip() == "2.0000"


def test_other_unpruned_results_are_taken_along_and_other_keys_left_alone():
    summary = small_summary() | {"dense_nf4": {"nll": 2.01}, "recovery": {"gap_closed_percent": 41.6}, "seed": 3}
    checked = Summary.from_dict(summary)
    assert [result.name for result in checked.results] == ["dense", "dense_nf4", "cut_50", "paper_a_50", "control"]
    assert checked.gap_closed == {"recovery": 41.6}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("cut_25", "ours, 16 bit"),
        ("cut_50_unrepaired", "ours, 16 bit"),
        ("cut_50_nf4", "ours, NF4"),
        ("recovered_50_nf4_merged", "ours, NF4, recovered"),
        ("paper_a_50_repaired", "paper A"),
        ("uniform_50", "other baselines"),
        ("reap_50", "other baselines"),
    ],
)
def test_stages_are_grouped_by_name(name, group):
    summary = Summary.from_dict({"dense": {"nll": 1.0}, "stages": [{"name": name, "prune_ratio": 0.5, "nll": 1.0}]})
    assert summary.others[0].group == group


STAGE = {"name": "cut", "prune_ratio": 0.5, "nll": 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dense": None},
            "The report compares with a row named `dense`, and there is none: run `evaluate --name dense`",
        ),
        ({"dense": {"nll": "low"}}, "'nll' of 'dense' must be a number, got 'low'"),
        ({"dense": {"nll": True}}, "'nll' of 'dense' must be a number, got True"),
        ({"dense": {"bytes": 3}}, "'nll' of 'dense' must be a number, got None"),
        ({"dense": {"nll": 1.0, "bytes": -1}}, "'bytes' of 'dense' must be finite and >= 0, got -1"),
        ({"dense": {"nll": 1.0, "seconds": math.inf}}, "'seconds' of 'dense' must be finite and >= 0, got inf"),
        ({"dense": {"nll": 1.0, "nll_per_corpus": [1]}}, "'nll_per_corpus' of 'dense' must be a mapping, got list"),
        (
            {"dense": {"nll": 1.0, "nll_per_corpus": {"code": "x"}}},
            "'code' of 'nll_per_corpus' of 'dense' must be a number, got 'x'",
        ),
        ({"stages": {"a": 1}}, "'stages' of the summary must be a list, got dict"),
        ({"stages": ["cut_50"]}, "Stage 0 must be a mapping, got str"),
        ({"stages": [{"nll": 1.0}]}, "Stage 0 of the summary needs a 'name', got None"),
        ({"stages": [{"name": "cut", "nll": 1.0}]}, "'prune_ratio' of 'cut' must be a number, got None"),
        ({"stages": [STAGE | {"prune_ratio": 1.0}]}, r"'prune_ratio' of 'cut' must be in \[0, 1\), got 1.0"),
        ({"stages": [STAGE, STAGE]}, r"needs its own name, got \['cut'\] more than once"),
        ({"exports": [3]}, "Export 0 must be a mapping, got int"),
        ({"exports": [{"max_logit_diff": math.nan}]}, "'max_logit_diff' of export 0 must be finite and >= 0, got nan"),
        ({"recovery": 3}, "'recovery' of the summary must be a mapping, got int"),
        ({"recovery": {"gap_closed_percent": "all"}}, "'recovery' of 'gap_closed_percent' must be a number, got 'all'"),
        ({"versions": ["torch"]}, "'versions' of the summary must be a mapping, got list"),
    ],
)
def test_a_broken_summary_is_refused_by_place(change, message):
    with pytest.raises(ValueError, match=message):
        Summary.from_dict({"dense": {"nll": 1.0}} | change)


def test_a_summary_needs_the_dense_model():
    with pytest.raises(ValueError, match="run `evaluate --name dense` on the unpruned model"):
        summary_table({"stages": []})
    with pytest.raises(ValueError, match="The summary must be a mapping, got list"):
        Summary.from_dict([])


def test_a_plan_in_words():
    shape = shape_of((2, 2, 2), (2, 2, 2))
    plan = hand_plan(shape=shape, keep=[[1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0]])
    whole, first, second = plan_in_words(plan)
    # 5 of 12 channels stay: 1 - 5 / 12 = 58.3 % go.
    assert whole == (
        "by_hand was asked to remove 50 % of the routed-expert channels and removes 58.3 %: 5 of 12 channels stay, "
        "in blocks of 1."
    )
    assert first == "Layer 0 keeps 33 %, lost experts 1 and 2."
    assert second == "Layer 1 keeps 50 %, lost expert 2."


def test_a_plan_in_words_that_loses_nothing_or_very_much():
    keep = [[True] * 16, [True] + [False] * 15]
    _, first, second = plan_in_words(hand_plan(shape=shape_of((1,) * 16, (1,) * 16), keep=keep))
    assert first == "Layer 0 keeps 100 %, lost no expert."
    assert second == "Layer 1 keeps 6 %, lost 15 of 16 experts."


def test_words_are_enumerated():
    assert [enumerate_words(words) for words in ([3], [3, 11], [3, 5, 11])] == ["3", "3 and 11", "3, 5 and 11"]


def test_layers_are_called_by_their_number_or_else_by_their_full_name():
    shape = make_statistics(num_layers=3).shape
    assert layer_labels(shape) == ("0", "1", "2")
    towers = shape.to_dict()
    for layer, name in zip(towers["layers"], ["text.0.mlp", "image.0.mlp", "last"], strict=True):
        layer["name"] = name
    assert layer_labels(type(shape).from_dict(towers)) == ("text.0.mlp", "image.0.mlp", "last")


def test_headlines_say_what_was_measured():
    summary = small_summary() | {"recovery": {"gap_closed_percent": {"recovered_50_nf4": 41.6}}}
    assert headlines(Summary.from_dict(summary)) == (
        "The dense model has a loss of 2.0000 nats per token on held-out text (perplexity 7.389) and has 8.00 MB.",
        "At prune ratio 0.50, our default against paper A's method: cut_50 loses 0.0500 nats per token above dense, "
        "paper_a_50 loses 0.2000 (0.25 of it).",
        "Recovery closed 42 % of the one-shot loss gap to the control (recovered_50_nf4).",
        "The smallest is cut_50: 4.00 MB, 2.00 times smaller than dense, and it loses 0.0500 nats per token above "
        "dense.",
        "Loaded again, the exports' logits differ from the model in memory by at most 0.34, for the median token by "
        "1.2e-06; up to 1.6% of tokens go to other experts, because their choice was close.",
    )


def test_headlines_of_a_broken_model_and_of_nothing_but_it():
    assert headlines(Summary.from_dict({"dense": {"nll": math.nan}})) == (
        "The dense model has a loss of nan nats per token on held-out text.",
    )


def test_the_whole_page_is_self_contained(tmp_path):
    statistics = make_statistics(corpora=("code", "speeches"), num_tokens=1000)
    plans = {name: build_method(name).plan(statistics, prune_ratio=0.5) for name in ("exact_global", "reap")}
    summary = small_summary() | {"versions": {"torch": "2.13.0"}}
    path = report(tmp_path, summary=summary, plans=plans, statistics=statistics)
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "report.html"
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", re.sub(r"base64,[^\"]+", "", text))
    assert set(re.findall(r'src="([^,]{0,30}),', text)) == {"data:image/png;base64"}
    images = [base64.b64decode(data) for data in re.findall(r'base64,([^"]+)"', text)]
    files = {file.name: file.read_bytes() for file in (tmp_path / "report_figures").iterdir()}
    # Two of the results, five of each plan, four of what experts and channels are worth, three of the routers.
    assert len(images) == 2 + 2 * 5 + 4 + 3
    assert sorted(images) == sorted(files.values())
    assert all(image.startswith(PNG_START) for image in images)
    expected_words = ("<td>+0.0500</td>", "In short", "The control is the unpruned model", "2.13.0", "Layer 1 keeps")
    for expected in expected_words:
        assert expected in text
    assert "Calibration saw 1,000 tokens of code, 1,000 tokens of speeches." in text


def test_a_report_of_only_a_plan(tmp_path):
    plan = build_method("exact_global").plan(make_statistics(), prune_ratio=0.25)
    text = report(tmp_path / "new", plans={"a_plan": plan}).read_text(encoding="utf-8")
    assert {file.name for file in (tmp_path / "new" / "report_figures").iterdir()} == {
        "plan_0_widths.png",
        "plan_0_kept.png",
    }
    assert "a_plan (exact_global, prune ratio 0.25)" in text
    assert not any(absent in text for absent in ("Results", "Versions", "Calibration saw", "control"))


def test_a_report_of_only_a_summary_or_only_statistics(tmp_path):
    text = report(tmp_path, summary={"dense": {"nll": 2.0, "nll_per_corpus": {"code": 1.5}}}).read_text(
        encoding="utf-8"
    )
    assert "<td>1.5000</td>" in text
    assert not list((tmp_path / "report_figures").iterdir())
    text = report(tmp_path, statistics=make_statistics()).read_text(encoding="utf-8")
    assert "Calibration saw" in text
    assert (tmp_path / "report_figures" / "entropy.png").is_file()


def test_every_text_from_a_file_is_escaped(tmp_path):
    evil = '<script>alert("$x$")</script>'
    summary = {
        "dense": {"nll": 2.0, "bytes": 9, "nll_per_corpus": {evil: 1.0}},
        "stages": [{"name": evil, "prune_ratio": 0.5, "nll": 2.5, "bytes": 5}],
        "exports": [{"path": evil, "format": evil}],
        "recovery": {"gap_closed_percent": {evil: 1.0}},
        "versions": {evil: evil},
    }
    statistics = make_statistics(corpora=(evil,))
    shape = statistics.shape
    plan = hand_plan(shape=shape, keep=[[1] * layer.num_channels for layer in shape.layers], method=evil)
    path = report(tmp_path, title=evil, summary=summary, plans={evil: plan}, statistics=statistics)
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    # Title and heading, headline, two tables of results, corpus, export twice, version twice, plan twice, calibration.
    assert text.count("&lt;script&gt;alert(&quot;$x$&quot;)&lt;/script&gt;") >= 12


def test_a_report_is_replaced_as_a_whole_and_other_files_stay(tmp_path):
    plan = build_method("exact_global").plan(make_statistics(), prune_ratio=0.25)
    report(tmp_path, summary=small_summary(), plans={"a": plan})
    (tmp_path / "summary.json").write_text("{}")
    before = (tmp_path / "report_figures" / "plan_0_kept.png").read_bytes()
    report(tmp_path, plans={"b": plan})
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "report.html", "report_figures"}
    assert len(list((tmp_path / "report_figures").iterdir())) == 2
    assert (tmp_path / "report_figures" / "plan_0_kept.png").read_bytes() == before


def test_an_error_leaves_the_old_report(tmp_path):
    path = report(tmp_path, summary=small_summary())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'nll' of 'dense'"):
        report(tmp_path, summary={"dense": {}})
    assert path.read_bytes() == before


def test_reports_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a summary, rows, a matrix, a plan, statistics or routing, got none"):
        report(tmp_path)
    with pytest.raises(ValueError, match="A report needs a `title`, got ' '"):
        report(tmp_path, title=" ", summary=small_summary())
    plan = build_method("exact_global").plan(make_statistics(num_experts=4), prune_ratio=0.25)
    with pytest.raises(
        ValueError, match=r"Plan 'a' does not belong to the statistics of this report\. The plan was made"
    ):
        report(tmp_path, plans={"a": plan}, statistics=make_statistics(num_experts=8))
    assert not list(tmp_path.iterdir())
