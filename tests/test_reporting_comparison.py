"""Rows of `compare.json`: checked, grouped over samples, drawn and put into words."""

import math

import pytest
from comparison_rows import dense_row, make_row

from lightning_moe.reporting import figures
from lightning_moe.reporting.comparison import Comparison, Setting
from lightning_moe.reporting.figures.frontier import pareto_frontier
from lightning_moe.reporting.figures.methods import method_styles
from lightning_moe.reporting.figures.retention import mean_accuracy, mean_stderr
from lightning_moe.reporting.sections.comparison import comparison_block, frontier_variants
from lightning_moe.reporting.verdict import duels, verdict

OURS = Setting(method="exact_global", ratio=0.5, bits=16, repair=False)


def three_samples():
    """Losses above dense: ours 0.1, 0.2, 0.3; paper A 0.5, 0.6, 0.7; ours repaired 0.1; NF4 0.25 at 2 MB."""
    rows = [make_row("exact_global", loss, sample=sample) for sample, loss in enumerate((0.1, 0.2, 0.3))]
    rows += [make_row("paper_a", loss, sample=sample) for sample, loss in enumerate((0.5, 0.6, 0.7))]
    rows += [make_row("exact_global", 0.1, repair=True), make_row("exact_global", 0.25, bits=4, bytes=2_000_000)]
    return [dense_row(), *rows]


def lines_by_colour(axes):
    """Points of the error bars' lines, by colour."""
    found = {}
    for container in axes.containers:
        line = container.lines[0]
        found.setdefault(line.get_color(), []).append([tuple(map(float, point)) for point in line.get_xydata()])
    return found


def test_rows_that_differ_in_the_sample_alone_are_one_variant():
    comparison = Comparison.from_rows(three_samples())
    spreads = {variant.setting: comparison.loss(variant) for variant in comparison.variants}
    assert len(comparison.variants) == 4
    assert comparison.num_samples == 3
    assert (spreads[OURS].mean, spreads[OURS].low, spreads[OURS].high) == pytest.approx((0.2, 0.1, 0.3))


def test_what_tells_rows_apart_is_in_the_label():
    row = make_row("mone", 0.1, bits=4, repair="after_nf4", calibrations=2, novices=True, export="uniform width")
    comparison = Comparison.from_rows([dense_row(), row, make_row("mone", 0.2, bits=4)])
    labels = [variant.setting.label for variant in comparison.variants]
    assert labels == [
        "mone 0.50 uniform width fitted after NF4 2 calibrations with mean outputs NF4, repaired",
        "mone 0.50 NF4",
    ]


def test_a_second_row_of_a_setting_and_sample_stands_for_itself():
    rows = [dense_row(), make_row("paper_a", 0.1, name="one"), make_row("paper_a", 0.3, name="other")]
    assert [variant.setting.variant for variant in Comparison.from_rows(rows).variants] == ["", "other"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": 1}, "A comparison must be a list of rows, got dict"),
        ([3], "Row 0 of the comparison must be a mapping, got int"),
        ([{"nll": 1.0}], "Row 0 of the comparison needs 'method', a text, got None"),
        ([{"method": "reap", "nll": "x"}], "'nll' of row 0 of the comparison must be a number, got 'x'"),
        ([{"method": "reap", "nll": 1.0, "ratio": 1.0}], r"'ratio' of row 0 of the comparison must be in \[0, 1\)"),
        ([{"method": "reap", "nll": 1.0, "kl": -1.0}], "'kl' of row 0 of the comparison must be finite and >= 0"),
        (
            [{"method": "reap", "nll": 1.0, "tasks": {"piqa": {}}}],
            "'acc' of 'piqa' of 'tasks' of row 0 of the comparison must be a number, got None",
        ),
        (
            [{"method": "reap", "nll": 1.0, "ratio": 0.5}],
            r"needs the row of the unpruned model \(method `dense`, ratio 0, 16 bit\), got the methods \['reap'\]",
        ),
    ],
)
def test_broken_rows_are_refused_by_place(rows, message):
    with pytest.raises(ValueError, match=message):
        Comparison.from_rows(rows)


def test_pareto_shows_means_spread_and_both_sizes():
    figure = figures.pareto(three_samples())
    left, right = figure.axes
    blue = method_styles(["exact_global"])["exact_global"].colour
    # 5 MB unless said otherwise; the NF4 row has 2 MB. Active parameters are 1.2 million.
    assert sorted(lines_by_colour(left)[blue]) == [
        [(2.0, pytest.approx(0.25))],
        [(5.0, pytest.approx(0.1))],
        [(5.0, pytest.approx(0.2))],
    ]
    assert {point[0] for line in lines_by_colour(right)[blue] for point in line} == {1.2}
    bars = [c.lines[2][0].get_segments()[0] for c in left.containers if c.lines[0].get_ydata()[0] == pytest.approx(0.2)]
    assert sorted(float(end) for end in bars[0][:, 1]) == pytest.approx([0.1, 0.3])
    assert left.get_xlabel() == "size on disk (MB)"
    assert right.get_xlabel() == "active parameters per token (million)"
    assert "nats per token" in left.get_ylabel()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        "dense",
        "exact_global",
        "paper_a",
        "repaired",
        "not repaired",
        "16 bit (filled)",
        "NF4 (hollow)",
        "frontier",
    ]


def test_pareto_joins_what_no_other_beats():
    left = figures.pareto(three_samples()).axes[0]
    frontier = next(line for line in left.lines if line.get_label() == "frontier")
    # From 2 MB at 0.25 over the repaired row at 5 MB to the dense model at 10 MB; 0.2 and 0.6 at 5 MB are beaten.
    assert frontier.get_xydata().tolist() == [[2.0, pytest.approx(0.25)], [5.0, pytest.approx(0.1)], [10.0, 0.0]]
    assert pareto_frontier([(1, 5), (1, 4), (2, 4), (3, 1)]) == [(1, 4), (3, 1)]


def test_pareto_leaves_out_models_that_broke_and_bears_losses_below_dense():
    rows = [dense_row(), make_row("reap", math.nan), make_row("paper_a", -0.1), make_row("uniform", 0.3, bytes=None)]
    figure = figures.pareto(rows)
    drawn = [tuple(container.lines[0].get_ydata()) for container in figure.axes[0].containers]
    assert drawn == [(pytest.approx(-0.1),)]
    assert figures.png_bytes(figure).startswith(b"\x89PNG")
    assert figures.png_bytes(figures.pareto([dense_row()])).startswith(b"\x89PNG")


def test_retention_sorts_methods_by_their_loss():
    figure = figures.by_retention(three_samples())
    sixteen, four = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["16 bit", "NF4"]
    assert [label.get_text() for label in sixteen.get_yticklabels()] == ["exact_global", "paper_a"]
    shown = {(float(c.lines[0].get_xdata()[0]), float(c.lines[0].get_ydata()[0])) for c in sixteen.containers}
    expected = [(0.1, -0.13), (0.2, 0.13), (0.6, 1.13)]
    assert sorted(shown) == [pytest.approx(point) for point in expected]
    assert [float(c.lines[0].get_xdata()[0]) for c in four.containers] == pytest.approx([0.25])
    assert "keeps 50%" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_retention_shows_accuracy_and_standard_error_where_tasks_were_run():
    tasks = {"arc_easy": {"acc": 0.4, "stderr": 0.03}, "piqa": {"acc": 0.6, "stderr": 0.04}}
    rows = [dense_row(tasks=tasks), make_row("reap", 0.2, tasks=tasks), make_row("uniform", 0.2)]
    row = Comparison.from_rows(rows).variants[0].rows[0]
    assert mean_accuracy(row, tasks=["arc_easy", "piqa"]) == pytest.approx(0.5)
    # sqrt(0.03^2 + 0.04^2) / 2 = 0.025
    assert mean_stderr(row, tasks=["arc_easy", "piqa"]) == pytest.approx(0.025)
    axes = figures.by_retention(rows).axes[0]
    bar = axes.containers[0].lines[2][0].get_segments()[0]
    assert bar[:, 0].tolist() == pytest.approx([0.475, 0.525])
    assert len(axes.containers) == 1
    assert axes.get_xlabel() == "mean accuracy over 2 tasks"


def test_retention_needs_a_ratio():
    with pytest.raises(ValueError, match="Retentions are shown of pruned rows with a `ratio`, got none"):
        figures.by_retention([dense_row()])


def test_the_verdict_says_which_row_to_take_and_whether_claims_hold():
    sentences = verdict(Comparison.from_rows([*three_samples(), make_row("paper_a", 0.04, bits=4, ratio=0.25)]))
    assert sentences[0] == (
        "Take paper_a 0.25 NF4: the smallest row within 0.05 nats per token of the dense model (5 % of its "
        "perplexity). It loses 0.0400 and has 5.00 MB, 2.00 times smaller than dense."
    )
    assert (
        "At prune ratio 0.50 in 16 bit, exact_global, repaired is best: it loses 0.1000 above dense; the next method "
        "is paper_a: 0.6000 (0.5000 to 0.7000)." in sentences
    )
    # 0.2 / 0.6 = 0.33; repair: 0.1 / 0.2; NF4: 0.25 - 0.2.
    assert (
        "Exact ablation against paper A's published method, neither repaired: exact_global loses 0.33 of what paper_a "
        "loses above dense, at prune ratio 0.50." in sentences
    )
    assert sentences[-2].startswith("Least-squares repair leaves 50% of the loss above dense on average")
    assert sentences[-1].startswith("NF4 adds 0.0500 nats per token on average")


def test_the_verdict_does_not_claim_what_the_samples_do_not_show():
    rows = [make_row("tb_coverage", loss, sample=sample) for sample, loss in enumerate((0.2, 0.4))]
    rows += [make_row("reap", loss, sample=sample) for sample, loss in enumerate((0.3, 0.5))]
    comparison = Comparison.from_rows([dense_row(), *rows])
    (duel,) = duels(comparison)
    assert (duel.share, duel.is_clear) == (pytest.approx(0.75), False)
    sentences = verdict(comparison)
    assert sentences[0].startswith("No row stays within 0.05 nats per token of the dense model; the closest is tb_cov")
    assert any(sentence.endswith("within the spread of the samples at 0.50.") for sentence in sentences)


def test_the_section_holds_frontier_claims_corpora_and_tasks():
    tasks = {"piqa": {"acc": 0.612, "stderr": 0.011}}
    rows = [row | {"tasks": tasks, "nll_per_corpus": {"co<de": row["nll"]}} for row in three_samples()]
    block = comparison_block(rows)
    html = block.html()
    assert [picture.name for picture in block.pictures] == ["pareto", "retention"]
    frontier = frontier_variants(Comparison.from_rows(rows))
    assert [(variant.setting.bits, variant.setting.repair) for variant in frontier] == [(4, False), (16, True)]
    for expected in (
        "+0.1000 to +0.3000",
        "61.2% ± 1.1",
        "co&lt;de",
        "Claims tested",
        "<td>0.33</td>",
        "<td>5.00</td>",
    ):
        assert expected in html
    assert "top-1 agreement" not in html
