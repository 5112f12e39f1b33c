"""Shapes, scores, and what all record files have in common."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from statistics_factory import make_plan, make_shape, make_statistics, rewrite, shape_of

from lightning_moe.records import (
    ChannelScores,
    ExpertScores,
    LayerShape,
    ModelShape,
    PrunePlan,
)


def test_layer_counts_channels_and_offsets():
    layer = LayerShape(name="m.experts", widths=(4, 0, 3), top_k=2)
    assert (layer.num_experts, layer.num_channels) == (3, 7)
    assert layer.offsets == (0, 4, 4, 7)
    assert layer.group_of_expert.tolist() == [0, 0, 0]


def test_groups_are_neighbouring_experts():
    layer = LayerShape(name="m.experts", widths=(1,) * 6, top_k=2, num_groups=3, top_k_groups=2)
    assert layer.group_of_expert.tolist() == [0, 0, 1, 1, 2, 2]


def test_shapes_are_frozen():
    layer = LayerShape(name="m.experts", widths=(4, 4), top_k=1)
    with pytest.raises(FrozenInstanceError, match="top_k"):
        layer.top_k = 2  # pyright: ignore


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "full name of its experts module, got ''"),
        ({"widths": [4, 4]}, "m.experts: `widths` must be a tuple of counts"),
        ({"widths": (4, -1)}, r"`widths` must be a tuple of counts >= 0, got \(4, -1\)"),
        ({"widths": (4, True)}, "`widths` must be a tuple of counts"),
        ({"widths": (0, 0)}, "at least one channel, got widths"),
        ({"top_k": 3}, "`top_k` must be between 1 and 2, got 3"),
        ({"top_k": 1.0}, "`top_k` must be between 1 and 2, got 1.0"),
        ({"num_groups": 0}, "`num_groups` must be between 1 and 2, got 0"),
        ({"top_k_groups": 2}, "`top_k_groups` must be between 1 and 1, got 2"),
        ({"widths": (4, 4, 4), "num_groups": 2}, "must divide the number of experts 3, got 2"),
    ],
)
def test_bad_layer_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LayerShape(**{"name": "m.experts", "widths": (4, 4), "top_k": 1} | fields)


def test_reachability_without_groups():
    layer = LayerShape(name="m.experts", widths=(4, 4, 4), top_k=2)
    layer.check_reachable([1, 0, 1])
    with pytest.raises(ValueError, match=r"m.experts: a token needs top_k=2 experts, only 1 of 3"):
        layer.check_reachable([0, 0, 4])


def test_reachability_counts_the_poorest_groups():
    # 3 groups of 4, two chosen, top 5: the two poorest groups hold 2 + 3 = 5 experts in the first case, 2 + 2 below.
    layer = LayerShape(name="m.experts", widths=(1,) * 12, top_k=5, num_groups=3, top_k_groups=2)
    layer.check_reachable([1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0])
    with pytest.raises(ValueError, match=r"only 4 of 12 can be reached \(experts per router group: \[2, 4, 2\]\)"):
        layer.check_reachable([1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0])


def test_every_group_keeps_two_experts():
    layer = LayerShape(name="m.experts", widths=(1,) * 8, top_k=2, num_groups=2, top_k_groups=2)
    with pytest.raises(ValueError, match=r"every router group needs 2 experts, got \[1, 4\]"):
        layer.check_reachable([1, 0, 0, 0, 1, 1, 1, 1])


def test_groups_of_one_expert_keep_that_expert():
    layer = LayerShape(name="m.experts", widths=(1, 1), top_k=1, num_groups=2, top_k_groups=2)
    layer.check_reachable([1, 1])
    with pytest.raises(ValueError, match="every router group needs 1 experts"):
        layer.check_reachable([1, 0])


def test_model_shape_round_trip_through_json():
    shape = make_shape(num_experts=4, num_groups=2, top_k_groups=1)
    assert ModelShape.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape
    assert shape.num_channels == 2 * 4 * 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": None}, "`model_type` and `router_digest` must be text, got None"),
        ({"hidden_size": 0}, "`hidden_size` must be a count >= 1, got 0"),
        ({"layers": ()}, "at least one LayerShape, got"),
        ({"layers": (LayerShape(name="a", widths=(1,), top_k=1),) * 2}, "different names, got"),
    ],
)
def test_bad_model_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(make_shape(), **fields)


def test_foreign_dicts_are_refused():
    content = make_shape().to_dict()
    with pytest.raises(ValueError, match=r"A model's shape must hold exactly the keys .* got list"):
        ModelShape.from_dict([])
    with pytest.raises(ValueError, match=r"A model's shape must hold exactly the keys .*got \['layers'\]"):
        ModelShape.from_dict({"layers": []})
    with pytest.raises(ValueError, match="`layers` of a model must be a list, got 'x'"):
        ModelShape.from_dict(content | {"layers": "x"})
    with pytest.raises(ValueError, match="`widths` of a layer must be a list of counts, got 3"):
        ModelShape.from_dict(content | {"layers": [content["layers"][0] | {"widths": 3}]})


@pytest.mark.parametrize(("kind", "size"), [(ChannelScores, 7), (ExpertScores, 2)])
def test_scores_survive_the_disk_and_validate(tmp_path, kind, size):
    shape = shape_of([3, 4], [3, 4])
    scores = kind(shape=shape, criterion="c", scores=(torch.arange(size).double(), torch.ones(size).double()))
    scores.save(tmp_path / "s")
    loaded = kind.load(tmp_path / "s")
    assert (loaded.shape, loaded.criterion, loaded.digest) == (shape, "c", scores.digest)
    assert loaded.scores[0].tolist() == list(range(size))
    with pytest.raises(ValueError, match=r"`scores` of c must have 2 layers, got 1"):
        replace(scores, scores=scores.scores[:1])
    with pytest.raises(ValueError, match=r"layers.0.experts: criterion c must not be negative"):
        replace(scores, scores=(scores.scores[0] - 1, scores.scores[1]))
    with pytest.raises(ValueError, match=rf"criterion c must be float64 of shape \({size},\)"):
        replace(scores, scores=(scores.scores[0][1:], scores.scores[1]))
    with pytest.raises(ValueError, match=r"layers.1.experts: criterion c holds NaN"):
        replace(scores, scores=(scores.scores[0], scores.scores[1] * float("nan")))
    rewrite(tmp_path / "s", shape={})
    with pytest.raises(ValueError, match=r"s' does not hold valid .* scores: A model's shape"):
        kind.load(tmp_path / "s")


@pytest.mark.parametrize("record", ["statistics", "channels", "experts", "plan"])
def test_broken_files_are_named(tmp_path, record):
    statistics = make_statistics()
    shape, path = statistics.shape, tmp_path / f"my_{record}.bin"
    ones = tuple(torch.ones(layer.num_experts).double() for layer in shape.layers)
    made = {
        "statistics": statistics,
        "channels": ChannelScores(
            shape=shape, criterion="x", scores=tuple(w["up_sq_norm"] for w in statistics.weights)
        ),
        "experts": ExpertScores(shape=shape, criterion="x", scores=ones),
        "plan": make_plan(shape),
    }[record]
    with pytest.raises(ValueError, match=f"There is no .* at '.*my_{record}.bin'"):
        type(made).load(path)
    made.save(path)
    whole = path.read_bytes()
    for broken in (b"", whole[:7], whole[: len(whole) // 2], whole[:-3], b"\xff" * 40):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"my_{record}.bin"):
            type(made).load(path)


def test_file_of_another_kind_is_refused(tmp_path):
    statistics = make_statistics()
    statistics.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"a' must hold channel scores of version 1, got .*calibration statistics"):
        ChannelScores.load(tmp_path / "a")
    (tmp_path / "b").write_text("[]")
    with pytest.raises(ValueError, match=r"b' must hold prune plan of version 1, got \[\]"):
        PrunePlan.load(tmp_path / "b")
