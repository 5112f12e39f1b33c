"""Figures of statistics, scores and plans, through their data against numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from statistics_factory import hand_statistics, make_plan, make_statistics, shape_of

from lightning_moe.allocation import build_method
from lightning_moe.allocation.smoothing import SMOOTHINGS, smooth
from lightning_moe.criteria import CHANNEL_CRITERIA, EXPERT_CRITERIA
from lightning_moe.records import ChannelScores, ExpertScores
from lightning_moe.reporting import figures
from lightning_moe.reporting.figures.curves import held_by_best, removed, rising_share, telling_layers
from lightning_moe.reporting.figures.experts import rank_correlation
from lightning_moe.reporting.figures.layers import channel_rms
from lightning_moe.reporting.sections.calibration import calibration_blocks
from lightning_moe.reporting.sections.plans import active_share, different_plans, plan_block, plan_row


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def mask(*values):
    return torch.tensor(values, dtype=torch.bool)


def hand_scores(*layers):
    """Two experts of two channels in each layer."""
    shape = shape_of(*((2, 2) for _ in layers))
    return ChannelScores(shape=shape, criterion="by_hand", scores=tuple(f64(*layer) for layer in layers))


def large():
    return make_statistics(num_layers=48, num_experts=128, width=16, top_k=8, corpora=("code", "math"))


def test_rising_share_and_what_the_best_hold():
    # 4, 3, 2, 1 of 10.
    assert rising_share(f64(1, 4, 2, 3)) == pytest.approx([0, 0.4, 0.7, 0.9, 1])
    assert held_by_best(f64(1, 4, 2, 3), share=0.5) == pytest.approx(0.7)
    assert rising_share(f64(0, 0)) == pytest.approx([0, 0.5, 1])


def test_expert_curves_show_each_expert_its_width_and_what_the_plan_keeps():
    scores = hand_scores((3, 1, 1, 1))
    weights = ExpertScores(shape=scores.shape, criterion="attribution", scores=(f64(2, 1),))
    # Of expert 0 the weaker channel stays: 1 of 4; expert 1 goes as a whole.
    plan = make_plan(scores.shape, keep=(mask(0, 1, 0, 0),))
    figure = figures.expert_curves(scores, weights=weights, plan=plan)
    first, dot, second = figure.axes[0].lines
    assert first.get_ydata() == pytest.approx([0, 0.75, 1])
    assert dot.get_xydata().tolist() == [[1, pytest.approx(0.25)]]
    assert second.get_ydata() == pytest.approx([0, 0.5, 1])
    assert (first.get_linestyle(), second.get_linestyle()) == ("-", "--")
    assert first.get_color().tolist() != second.get_color().tolist()
    assert figure.axes[0].get_title() == "layer 0 (first, middle, last, most cut)\nkeeps 25%; 1 of 2 experts lost"
    assert "by_hand" in figure.get_supylabel()


def test_expert_curves_are_of_the_first_middle_last_and_most_cut_layer():
    shape = shape_of(*((2, 2) for _ in range(6)))
    keep = [mask(1, 1, 1, 1) for _ in range(6)]
    keep[4] = mask(1, 0, 1, 0)
    plan = make_plan(shape, keep=tuple(keep))
    assert telling_layers(plan) == {0: "first", 2: "middle", 4: "most cut", 5: "last"}
    weights = ExpertScores(shape=shape, criterion="attribution", scores=(f64(0, 0),) * 6)
    figure = figures.expert_curves(hand_scores(*((1, 1, 1, 1) for _ in range(6))), weights=weights, plan=plan)
    assert len(figure.axes) == 4 + 1
    with pytest.raises(ValueError, match="The plan was made for another model"):
        figures.expert_curves(hand_scores((1, 1, 1, 1)), weights=weights, plan=plan)


def test_cut_cost_adds_up_what_goes():
    # Lowest score first: channels 2, 0, 3, 1 with errors 8, 1, 4, 2.
    ratio, gone = removed(f64(2, 9, 1, 3), order_C=f64(2, 9, 1, 3), value_C=f64(1, 2, 8, 4))
    assert ratio.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert gone.tolist() == [0, 8, 9, 13, 15]


def test_cut_cost_draws_a_line_per_layer_their_mean_and_the_best_order():
    shape = shape_of((2, 2), (2, 2))
    layers = [{"channel_ablation": [1.0, 2.0, 8.0, 4.0]}, {"channel_ablation": [1.0, 1.0, 1.0, 1.0]}]
    statistics = hand_statistics(shape, layers=layers, num_tokens=10)
    scores = ChannelScores(shape=shape, criterion="by_hand", scores=(f64(2, 9, 1, 3), f64(1, 1, 1, 1)))
    figure = figures.cut_cost(scores, statistics=statistics)
    left, right = figure.axes[:2]
    # Half of the channels gone: of a score of 15 stay 12; errors (8 + 1) / 10 tokens, then 2 / 10.
    middle = np.argmin(np.abs(left.lines[0].get_xdata() - 0.5))
    assert left.lines[0].get_ydata()[middle] == pytest.approx(12 / 15, abs=0.01)
    ends = {line.get_label(): line.get_ydata()[-1] for line in right.lines}
    assert ends["mean of the layers"] == pytest.approx((1.5 + 0.4) / 2)
    assert ends["the same, by exact ablation"] == pytest.approx((1.5 + 0.4) / 2)
    by_score, best = right.lines[-2].get_ydata(), right.lines[-1].get_ydata()
    assert (best <= by_score + 1e-12).all()
    assert "cross terms left out" in right.get_title()
    with pytest.raises(ValueError, match="Scores and statistics belong to models of different shape"):
        figures.cut_cost(scores, statistics=make_statistics())


def test_concentration_has_a_line_per_share():
    axes = figures.concentration(hand_scores((1, 4, 2, 3), (1, 1, 1, 1))).axes[0]
    curves = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 2 and line.get_marker() == "o"]
    # 10 % of four channels round to none, 25 % are one, 50 % two.
    assert [list(values) for values in curves] == [[0, 0], pytest.approx([0.4, 0.25]), pytest.approx([0.7, 0.5])]


def test_rank_correlation_by_hand():
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 9.0, 10.0])) == pytest.approx(1)
    # Ranks 1, 2, 3 and 3, 1, 2: 1 - 6 * (4 + 1 + 1) / (3 * 8) = -0.5
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([7.0, 1.0, 2.0])) == pytest.approx(-0.5)
    # Ties take their mean rank: 1.5, 1.5, 3 against 1, 2, 3.
    assert rank_correlation(np.array([5.0, 5.0, 6.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(math.sqrt(0.75))
    assert math.isnan(rank_correlation(np.array([1.0, 1.0]), np.array([1.0, 2.0])))


def test_expert_scores_show_shares_and_leave_out_experts_without_tokens():
    layer = {"count": [6.0, 2.0, 2.0, 0.0], "gate_weight": [1.0, 2.0, 1.0, 0.0], "ablation": [1.0, 2.0, 1.0, 0.0]}
    figure = figures.expert_scores(hand_statistics(shape_of((1, 1, 1, 1)), layers=[layer]))
    usage, weight, agreement = (figure.axes[index] for index in (0, 1, 2))
    points = [sorted(axes.collections[0].get_offsets().tolist()) for axes in (usage, weight)]
    assert isinstance(usage.collections[0], PathCollection)
    assert points[0] == [[0.2, 0.25], [0.2, 0.5], [0.6, 0.25]]
    assert points[1] == [[0.25, 0.25], [0.25, 0.25], [0.5, 0.5]]
    # Usage 3, 1.5, 1.5 against 1.5, 3, 1.5; the router's weight orders the experts exactly.
    assert usage.texts[0].get_text() == "rank correlation: -0.50 on average"
    assert weight.texts[0].get_text() == "rank correlation: 1.00 on average"
    assert [line.get_ydata()[0] for line in agreement.lines[:2]] == pytest.approx([-0.5, 1.0])


def test_layer_weights_show_loss_smoothing_coverage_and_keep_ratio():
    shape = shape_of((2, 2), (2, 2))
    statistics = hand_statistics(shape, layers=[{"layer_energy": 3.0}, {"layer_energy": 1.0}])
    plan = make_plan(shape, keep=(mask(1, 1, 0, 1), mask(1, 0, 1, 0)))
    scores = hand_scores((4, 3, 2, 1), (1, 1, 1, 1))
    top, bottom = figures.layer_weights(statistics, plan=plan, scores=scores).axes
    assert top.lines[0].get_ydata() == pytest.approx([1.5, 0.5])
    assert top.lines[1].get_ydata() == pytest.approx(smooth(f64(3, 1)).numpy())
    assert [bar.get_height() for bar in bottom.patches] == [0.75, 0.5]
    # 4 + 3 + 1 of 10, then 2 of 4.
    assert bottom.lines[0].get_ydata() == pytest.approx([0.8, 0.5])
    assert [text.get_text() for text in top.get_legend().get_texts()] == ["layer loss", "smoothed (sqrt4)"]
    with pytest.raises(ValueError, match="`smoothing` must be one of"):
        figures.layer_weights(statistics, plan=plan, scores=scores, smoothing="cube")


def test_smoothings_has_a_line_for_each():
    statistics = make_statistics(num_layers=5)
    axes = figures.smoothings(statistics).axes[0]
    loss_L = torch.stack([sums["layer_energy"] for sums in statistics.total()])
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    for name in SMOOTHINGS:
        assert lines[name] == pytest.approx(smooth(loss_L, smoothing=name).numpy())


def test_activations_are_a_root_mean_square_over_routed_pairs():
    shape = shape_of((2, 1))
    layer = {"hidden_sq": [4.0, 8.0, 6.0], "count": [2.0, 3.0]}
    statistics = hand_statistics(shape, layers=[layer])
    # (4 + 8 + 6) / (2 tokens * 2 channels + 3 tokens * 1 channel)
    assert channel_rms(statistics, layers=statistics.corpora["text"]) == pytest.approx([math.sqrt(18 / 7)])
    axes = figures.activation_depth(statistics, after=statistics).axes[0]
    assert [line.get_label() for line in axes.lines] == ["text", "text, after the cut"]


def test_mean_entropy_takes_the_middles_of_the_bins():
    statistics = hand_statistics(shape_of((2, 2)), layers=[{"entropy_histogram": [3.0] + [0.0] * 30 + [1.0]}])
    assert figures.mean_entropies(statistics)["text"] == pytest.approx([(3 * 0.5 / 32 + 31.5 / 32) / 4])


def test_active_share_weighs_widths_by_use():
    shape = shape_of((2, 2))
    statistics = hand_statistics(shape, layers=[{"count": [9.0, 1.0]}])
    plan = make_plan(shape, keep=(mask(1, 1, 1, 0),))
    # Three of four channels are stored; nine of ten tokens went to the expert that stays whole.
    assert active_share(plan, statistics=statistics) == pytest.approx(0.95)
    lost = make_plan(shape, keep=(mask(1, 1, 0, 0),))
    row = plan_row("p", plan=lost, statistics=statistics)
    assert (row["stored"], row["active"], row["lost"]) == (0.5, pytest.approx(1.0), 1)  # all tokens use the other one


def test_plans_that_keep_the_same_are_shown_once_and_few_with_figures():
    statistics = make_statistics()
    made = {
        f"{name}_{ratio}": build_method(name).plan(statistics, prune_ratio=ratio)
        for name in ("exact_global", "reap")
        for ratio in (0.25, 0.5, 0.75)
    }
    plans = {"dense": build_method("reap").plan(statistics, prune_ratio=0.0)} | made | {"again": made["reap_0.5"]}
    found = {names[0]: names[1:] for names, _ in different_plans(plans)}
    assert "dense" not in found
    assert found["reap_0.5"] == ["again"]
    html = plan_block(plans, statistics=statistics).html()
    assert html.count("<details") == 4
    assert "The same channels" not in html
    assert "Without figures here, to keep the page small: reap_0.5 and reap_0.75." in html


def test_figures_bear_48_layers_of_128_experts():
    statistics = large()
    plan = build_method("exact_global").plan(statistics, prune_ratio=0.5)
    scores = CHANNEL_CRITERIA["channel_ablation"](statistics)
    weights = EXPERT_CRITERIA["attribution"](statistics)
    curves = figures.expert_curves(scores, weights=weights, plan=plan)
    assert sum(len(line.get_ydata()) > 1 for line in curves.axes[0].lines) == 128
    worth = figures.expert_scores(statistics)
    assert len(worth.axes[0].collections[0].get_offsets()) == 48 * 128
    for figure in (curves, worth, figures.layer_weights(statistics, plan=plan, scores=scores)):
        assert figure.get_figwidth() <= 12
        assert all(len(axes.get_xticklabels()) <= 24 for axes in figure.axes)


def test_sections_of_calibration_hold_what_there_is():
    statistics = make_statistics(corpora=("code", "math"))
    names = [picture.name for block in calibration_blocks(statistics) for picture in block.pictures]
    worth = ["expert_scores", "concentration", "cut_cost", "smoothings"]
    assert names == [*worth, "entropy_depth", "entropy", "activations"]
    routing = {"before (step 0)": {"code": [0.5]}, "after (step 9)": {"code": [0.4]}}
    (block,) = calibration_blocks(None, routing=routing)
    assert [picture.name for picture in block.pictures] == ["routing"]
    assert calibration_blocks(None) == []
