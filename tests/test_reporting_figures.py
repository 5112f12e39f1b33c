"""The figures hold the right numbers: read back from their axes."""

import math
import sys

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.text import Annotation
from statistics_factory import hand_statistics, make_statistics, shape_of

from lightning_moe.allocation import build_method
from lightning_moe.records import ChannelScores, PrunePlan
from lightning_moe.reporting import Summary
from lightning_moe.reporting.figures import (
    kept_share,
    png_bytes,
    quality_against_bytes,
    router_entropy,
    score_curves,
    stage_losses,
    usage_against_width,
    width_heatmap,
)


def hand_plan(shape, *, keep):
    masks = tuple(torch.tensor(mask, dtype=torch.bool) for mask in keep)
    return PrunePlan(shape=shape, method="by_hand", prune_ratio=0.5, align=1, keep=masks, provenance={})


def two_layers():
    """Expert 1 of layer 0 goes; layer 1 has only two experts, and keeps 3 of 4 channels."""
    shape = shape_of((2, 2, 2), (2, 2))
    return hand_plan(shape, keep=[[1, 1, 0, 0, 1, 0], [1, 1, 0, 1]])


def points(axes: Axes) -> list[np.ndarray]:
    found = [item.get_offsets() for item in axes.collections if isinstance(item, PathCollection)]
    return [np.asarray(offsets) for offsets in found if len(offsets)]


def summary_of(*stages, **extra):
    rows = [dict(zip(("name", "nll", "bytes"), stage, strict=True)) | {"prune_ratio": 0.5} for stage in stages]
    return Summary.from_dict({"dense": {"nll": 2.0, "bytes": 8_000_000}, "stages": rows} | extra)


def bars(axes: Axes) -> dict[str, float]:
    labels = {
        round(tick): label.get_text() for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    }
    return {labels[round(bar.get_y() + bar.get_height() / 2)]: bar.get_width() for bar in axes.patches}


def test_heatmap_shows_widths_and_crosses():
    axes = width_heatmap(two_layers()).axes[0]
    shown = axes.images[0].get_array()
    # Layer 0 keeps 2, 0 and 1 channels; layer 1 keeps 2 and 1 and has no third expert.
    assert shown.filled(-1).tolist() == [[2, 0, 1], [2, 1, -1]]
    assert [offsets.tolist() for offsets in points(axes)] == [[[1, 0]]]
    assert sorted(text.get_text() for text in axes.texts) == ["1", "1", "2", "2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]


def test_heatmap_leaves_experts_blank_that_were_gone_before():
    shape = shape_of((2, 0, 2))
    axes = width_heatmap(hand_plan(shape, keep=[[1, 1, 0, 0]])).axes[0]
    assert axes.images[0].get_array().filled(-1).tolist() == [[2, -1, 0]]
    assert points(axes)[0].tolist() == [[2, 0]]
    assert "1 in all" in axes.get_title()


def test_a_heatmap_of_many_experts_has_no_numbers():
    plan = build_method("reap").plan(make_statistics(num_layers=3, num_experts=64, width=16), prune_ratio=0.5)
    figure = width_heatmap(plan)
    assert not figure.axes[0].texts
    assert len(points(figure.axes[0])[0]) == 3 * 32
    assert figure.get_figwidth() <= 13


def test_kept_share_has_a_bar_per_layer_and_the_mean():
    axes = kept_share(two_layers()).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.75]
    # 3 + 3 of 10 channels stay.
    assert axes.lines[0].get_ydata()[0] == pytest.approx(0.6)
    assert [text.get_text() for text in axes.texts] == ["50%", "75%"]


def test_score_curves_are_cumulative_and_the_dot_is_what_the_plan_keeps():
    shape = shape_of((2, 2))
    scores = ChannelScores(shape=shape, criterion="by_hand", scores=(torch.tensor([1.0, 4.0, 2.0, 3.0]).double(),))
    axes = score_curves(scores, plan=hand_plan(shape, keep=[[0, 1, 1, 0]])).axes[0]
    curve, dot = axes.lines[0], axes.lines[1]
    # Sorted 4, 3, 2, 1 of 10; the plan keeps 4 + 2 = 6 of 10 with half of the channels.
    assert curve.get_xdata() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert curve.get_ydata() == pytest.approx([0, 0.4, 0.7, 0.9, 1])
    assert dot.get_xydata()[0] == pytest.approx([0.5, 0.6])
    assert "by_hand" in axes.get_ylabel()


def test_score_curves_without_a_plan_and_without_a_score():
    statistics = make_statistics(num_layers=3, num_experts=16, width=64)
    scores = [torch.rand(16 * 64, dtype=torch.float64) for _ in range(2)] + [torch.zeros(16 * 64, dtype=torch.float64)]
    axes = score_curves(ChannelScores(shape=statistics.shape, criterion="c", scores=tuple(scores))).axes[0]
    assert len(axes.lines) == 3 + 1
    assert len(axes.lines[0].get_xdata()) == 400
    assert axes.lines[2].get_ydata() == pytest.approx(axes.lines[2].get_xdata(), abs=1e-12)


def test_usage_against_width_by_hand():
    shape = shape_of((2, 2, 2))
    statistics = hand_statistics(shape, layers=[{"count": [6.0, 3.0, 1.0]}])
    axes = usage_against_width(statistics, plan=hand_plan(shape, keep=[[1, 1, 1, 0, 0, 0]])).axes[0]
    kept, evicted = points(axes)
    assert kept == pytest.approx(np.array([[0.6, 1.0], [0.3, 0.5]]))
    assert evicted == pytest.approx(np.array([[0.1, 0.0]]))
    assert axes.lines[0].get_xdata()[0] == pytest.approx(1 / 3)


def test_figures_of_a_plan_refuse_another_model():
    plan, other = two_layers(), make_statistics()
    with pytest.raises(ValueError, match="The plan was made for another model: model_type of model is qwen3_moe here"):
        usage_against_width(other, plan=plan)
    zeros = tuple(torch.zeros(layer.num_channels, dtype=torch.float64) for layer in other.shape.layers)
    with pytest.raises(ValueError, match="The plan was made for another model"):
        score_curves(ChannelScores(shape=other.shape, criterion="c", scores=zeros), plan=plan)


def test_router_entropy_is_a_distribution_per_corpus():
    statistics = make_statistics(corpora=("code", "_speeches"))
    figure = router_entropy(statistics)
    for stairs, layers in zip(figure.axes[0].patches, statistics.corpora.values(), strict=True):
        count_B = sum(layer["entropy_histogram"] for layer in layers)
        assert stairs.get_data().values == pytest.approx((count_B / count_B.sum()).numpy())
        assert stairs.get_data().edges[[0, -1]].tolist() == [0, 1]
    names = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert names == ["code", "_speeches"]


def test_stage_losses_are_bars_above_dense_in_groups():
    summary = summary_of(("reap_50", 2.5, 4), ("cut_50", 2.1, 4), ("recovered", 1.9, 4), control={"nll": 1.95})
    axes = stage_losses(summary).axes[0]
    assert bars(axes) == pytest.approx({"cut_50": 0.1, "recovered": -0.1, "control": -0.05, "reap_50": 0.5})
    headed = [label.get_text() for label in axes.get_yticklabels() if label.get_fontweight() == "bold"]
    assert headed == ["ours, 16 bit", "ours, NF4, recovered", "control", "other baselines"]
    assert sorted(text.get_text() for text in axes.texts) == ["+0.1000", "+0.5000", "-0.0500", "-0.1000"]


def test_a_loss_that_is_not_finite_has_no_bar_and_says_so():
    summary = summary_of(("cut_50", math.nan, 4_000_000), ("reap_50", math.inf, 4_000_000))
    axes = stage_losses(summary).axes[0]
    assert not axes.patches
    assert [text.get_text() for text in axes.texts] == ["not finite", "not finite"]
    assert [offsets.tolist() for offsets in points(quality_against_bytes(summary).axes[0])] == [[[8.0, 0.0]]]


def test_quality_against_bytes_has_a_labelled_point_per_result():
    summary = summary_of(("cut_50", 2.1, 4_000_000), ("no_bytes", 2.3, None), ("reap_50", 2.5, 4_100_000))
    axes = quality_against_bytes(summary).axes[0]
    assert axes.get_xscale() == "log"
    assert np.concatenate(points(axes)) == pytest.approx(np.array([[8.0, 0.0], [4.0, 0.1], [4.1, 0.5]]))
    labels = {text.get_text(): text.xy for text in axes.texts if isinstance(text, Annotation)}
    assert labels == {"dense": (8.0, 0.0), "cut_50": (4.0, pytest.approx(0.1)), "reap_50": (4.1, 0.5)}


def test_labels_of_close_points_do_not_overlap():
    summary = summary_of(*((f"method_{index}", 2.1 + 0.001 * index, 4_000_000) for index in range(6)))
    figure = quality_against_bytes(summary)
    figure.draw_without_rendering()
    # The text alone: an annotation's own extent takes in its line, which may cross another.
    boxes = [text.get_bbox_patch().get_window_extent() for text in figure.axes[0].texts]
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.padded(-2).overlaps(b.padded(-2))]
    assert len(boxes) == 7
    assert not overlaps


def test_text_from_files_is_never_read_as_mathematics_and_never_endless():
    summary = summary_of(("cost $x^{$ and $", 2.5, 4_000_000), ("n" * 90, 2.5, 4_000_000))
    figure = stage_losses(summary)
    assert png_bytes(figure)
    assert png_bytes(quality_against_bytes(summary))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[1:] == [r"cost \$x^{\$ and \$", "n" * 39 + "…"]


def test_the_same_figure_gives_the_same_bytes_and_pyplot_knows_nothing():
    assert png_bytes(kept_share(two_layers())) == png_bytes(kept_share(two_layers()))
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()
