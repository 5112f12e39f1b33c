"""Damaged files: whatever the damage, loading ends in the record that was saved or in a ValueError naming the file."""

import json
import random

import pytest
import torch
from statistics_factory import make_plan, make_statistics, shape_of

from lightning_moe.criteria import CHANNEL_CRITERIA
from lightning_moe.records import CalibrationStatistics, ChannelScores, PrunePlan


def flipped(content, *, generator):
    """One byte changed, removed, doubled, or a run of bytes cut out."""
    place = generator.randrange(len(content))
    kind = generator.randrange(4)
    if kind == 0:
        return content[:place] + bytes([generator.randrange(256)]) + content[place + 1 :]
    if kind == 1:
        return content[:place] + content[place + 1 :]
    if kind == 2:
        return content[: place + 1] + content[place:]
    return content[:place] + content[place + generator.randrange(1, 200) :]


def outcome(kind, path):
    """`loaded`, or the message of the ValueError; any other exception fails the test."""
    try:
        kind.load(path)
    except ValueError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("seed", range(150))
def test_damaged_plan(tmp_path, seed):
    path = tmp_path / "plan.json"
    make_plan(shape_of([4, 12, 0], [16, 8, 8], top_k=2)).save(path)
    path.write_bytes(flipped(path.read_bytes(), generator=random.Random(seed)))
    message = outcome(PrunePlan, path)
    assert message == "loaded" or "plan.json" in message


@pytest.mark.parametrize("seed", range(150))
@pytest.mark.parametrize("kind", [CalibrationStatistics, ChannelScores])
def test_damaged_tensors(tmp_path, kind, seed):
    path = tmp_path / "tensors.safetensors"
    statistics = make_statistics(num_layers=1, num_experts=2, width=2, hidden=2, optional=True)
    (statistics if kind is CalibrationStatistics else CHANNEL_CRITERIA["camera"](statistics)).save(path)
    content = path.read_bytes()
    # The header holds all structure; it comes first. Damage to the numbers is a valid file with other numbers, or NaN.
    generator, header = random.Random(seed), 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(flipped(content[:header], generator=generator) + content[header:])
    message = outcome(kind, path)
    assert message == "loaded" or "tensors.safetensors" in message


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [[]], 1e300, -1, 10**30, True])
@pytest.mark.parametrize("key", ["shape", "keep", "method", "prune_ratio", "align", "provenance"])
def test_plan_with_a_foreign_value(tmp_path, key, value):
    path = tmp_path / "plan.json"
    make_plan(shape_of([4, 12])).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    message = outcome(PrunePlan, path)
    # A text is a legal method, an empty mapping a legal provenance, a large number a legal `align`.
    if (key, value) in [("method", "x"), ("provenance", {}), ("align", 3), ("align", 10**30)]:
        assert message == "loaded"
    else:
        assert "plan.json" in message


@pytest.mark.parametrize("value", [None, "x", [], {}, 1.5, -1, 10**30, [10**18, 10**18]])
@pytest.mark.parametrize("key", ["name", "widths", "top_k", "num_groups", "top_k_groups"])
def test_plan_of_a_foreign_layer_allocates_nothing(tmp_path, key, value):
    path = tmp_path / "plan.json"
    make_plan(shape_of([4, 12])).save(path)
    content = json.loads(path.read_text())
    content["shape"]["layers"][0][key] = value
    path.write_text(json.dumps(content))
    message = outcome(PrunePlan, path)
    assert "plan.json" in message


def test_statistics_with_damaged_numbers_name_the_statistic(tmp_path):
    statistics = make_statistics(num_layers=1)
    statistics.save(tmp_path / "s")
    content = bytearray((tmp_path / "s").read_bytes())
    content[-8:] = b"\xff" * 8  # a float64 of ones is NaN
    (tmp_path / "s").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"s' does not hold valid calibration statistics: .* holds NaN or infinity"):
        CalibrationStatistics.load(tmp_path / "s")


def test_merging_in_any_grouping_is_the_same_run():
    first = make_statistics(corpora=("a", "b"), seed=1)
    parts = [first] + [
        CalibrationStatistics(shape=other.shape, corpora=other.corpora, weights=first.weights)
        for other in (make_statistics(corpora=("b",), seed=2), make_statistics(corpora=("b", "a"), seed=3))
    ]
    left = parts[0].merge(parts[1]).merge(parts[2])
    right = parts[0].merge(parts[1].merge(parts[2]))
    for corpus in ("a", "b"):
        for mine, theirs in zip(left.corpora[corpus], right.corpora[corpus], strict=True):
            assert all(torch.allclose(mine[name], theirs[name], rtol=1e-14) for name in mine)
