import json
from dataclasses import replace

import pytest
import torch
from statistics_factory import make_plan, make_shape, shape_of

from lightning_moe.records import (
    PrunePlan,
)


def test_plan_counts():
    shape = shape_of([2, 3], [4, 0, 1])
    keep = (torch.tensor([1, 0, 1, 1, 0]).bool(), torch.tensor([0, 0, 0, 0, 1]).bool())
    plan = make_plan(shape, keep=keep)
    assert (plan.widths(0), plan.widths(1)) == ((1, 2), (0, 0, 1))
    # Expert 1 of the second layer had no channel to begin with: only expert 0 is evicted by this plan.
    assert (plan.evicted(0), plan.evicted(1)) == ((), (0,))
    assert plan.num_kept == 4
    assert plan.achieved_prune_ratio == pytest.approx(0.6)  # 6 of 10 channels go


def test_plan_file_has_one_readable_mask_per_expert(tmp_path):
    shape = shape_of([4, 12])
    # Expert 0 keeps 1010 -> a0; expert 1 keeps 1111 0000 0001 -> f0 10: the first channel is the highest bit.
    keep = torch.tensor([1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]).bool()
    make_plan(shape, keep=(keep,)).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["keep"] == {"layers.0.experts": ["a0", "f010"]}
    lines = [line.strip() for line in (tmp_path / "plan.json").read_text().splitlines()]
    assert '"a0",' in lines
    assert '"widths": [4, 12],' in lines


def test_plan_survives_the_disk(tmp_path):
    plan = make_plan(make_shape(width=13, num_experts=3), provenance={"text": "[\n 1,\n 2\n]", "empty": ""})
    plan.save(tmp_path / "plan.json")
    loaded = PrunePlan.load(tmp_path / "plan.json")
    assert loaded.digest == plan.digest
    assert loaded.provenance == plan.provenance
    assert (loaded.shape, loaded.method, loaded.prune_ratio, loaded.align) == (plan.shape, "by_hand", 0.5, 1)
    assert all(torch.equal(a, b) for a, b in zip(loaded.keep, plan.keep, strict=True))


def test_plan_digest_is_what_is_kept():
    shape = make_shape()
    plan = make_plan(shape)
    assert make_plan(shape, provenance={}).digest == plan.digest
    assert make_plan(shape, keep=tuple(~keep for keep in plan.keep)).digest != plan.digest
    assert make_plan(replace(shape, router_digest="other")).digest != plan.digest


def test_summary_shows_every_layer():
    keep = torch.tensor([1, 1, 0, 0, 0, 1]).bool()
    text = make_plan(shape_of([2, 2, 2], top_k=2), keep=(keep,), align=1).summary()
    assert "by_hand: prune_ratio 0.5 asked, 0.5 achieved (keep_ratio 0.5), align 1" in text
    assert "3 of 6 channels stay" in text
    line = next(line for line in text.splitlines() if line.startswith("layers.0.experts"))
    assert line.split()[1:] == ["2/3", "3/6", "50.0%", "1/2/2"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prune_ratio": 1.0}, r"`prune_ratio` must be in \[0, 1\), got 1.0"),
        ({"prune_ratio": -0.1}, r"`prune_ratio` must be in \[0, 1\), got -0.1"),
        ({"prune_ratio": float("nan")}, r"`prune_ratio` must be in \[0, 1\), got nan"),
        ({"prune_ratio": "half"}, "`prune_ratio` must be a number in .* got 'half'"),
        ({"align": 0}, "`align` must be a count >= 1, got 0"),
        ({"provenance": {"ratio": 3}}, r"`method` and `provenance` must be text, got .*3\]"),
        ({"keep": ()}, "`keep` must have 2 layers, got 0"),
        (
            {"keep": (torch.ones(3).bool(),) * 2},
            r"`keep` must be bool of shape \(256,\), got torch.bool of shape \(3,\)",
        ),
        ({"keep": (torch.ones(256),) * 2}, r"`keep` must be bool of shape \(256,\), got torch.float32"),
        ({"keep": (torch.zeros(256).bool(),) * 2}, r"layers.0.mlp.experts: a token needs top_k=2 experts, only 0"),
    ],
)
def test_bad_plan_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_plan(make_shape(), **fields)


def test_plan_fits_its_own_model_only():
    shape = make_shape()
    plan = make_plan(shape)
    plan.check_fits(make_shape())
    wider = make_shape(width=33)
    differences = {
        "model_type of model is olmoe here and qwen3_moe in the plan": replace(shape, model_type="olmoe"),
        "hidden_size of model is 128 here and 64 in the plan": replace(shape, hidden_size=128),
        "router_digest of model is abc here .* another checkpoint .* another type .*`dtype`": replace(
            shape, router_digest="abc"
        ),
        "number of MoE layers is 1 here and 2 in the plan": replace(shape, layers=shape.layers[:1]),
        r"widths of model.layers.1.mlp.experts is \[33,": replace(shape, layers=(shape.layers[0], wider.layers[1])),
        "top_k of model.layers.0.mlp.experts is 3 here and 2 in": make_shape(top_k=3),
        "hidden_size of model is 32 here": replace(shape, hidden_size=32, router_digest="abc"),
    }
    for message, other in differences.items():
        with pytest.raises(ValueError, match=f"made for another model: {message}"):
            plan.check_fits(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "must hold prune plan of version 1, got .*9"),
        ({"kind": "cake"}, "must hold prune plan of version 1, got .*cake"),
        ({"shape": None}, "A model's shape must hold exactly the keys"),
        ({"align": "x"}, "`align` must be a count >= 1, got 'x'"),
        ({"provenance": 3}, "is not a valid prune plan: .*int"),
        ({"keep": None}, "`keep` must have one entry per layer"),
        ({"keep": {}}, r"`keep` must have one entry per layer, .* got \[\]"),
        ({"keep": {"layers.0.experts": ["a0"]}}, "`keep` must be a list of 2 masks"),
        ({"keep": {"layers.0.experts": "a0f0"}}, "`keep` must be a list of 2 masks"),
        ({"keep": {"layers.0.experts": ["a0", "f0"]}}, "mask of expert 1 must have 4 digits, got 2 characters"),
        ({"keep": {"layers.0.experts": ["a0", 7]}}, "mask of expert 1 must have 4 digits, got int"),
        ({"keep": {"layers.0.experts": ["a0", "zzzz"]}}, "mask of expert 1 is not hexadecimal: 'zzzz'"),
        ({"keep": {"layers.0.experts": ["af", "f010"]}}, "mask of expert 0 has bits beyond its 4 channels"),
    ],
)
def test_edited_plan_file_is_refused(tmp_path, change, message):
    path = tmp_path / "plan.json"
    make_plan(shape_of([4, 12])).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"plan.json.*{message}"):
        PrunePlan.load(path)


def test_plan_file_without_a_key_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    make_plan(shape_of([4, 12])).save(path)
    content = json.loads(path.read_text())
    del content["method"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"plan.json' is not a valid prune plan: 'method' is missing. Plan again"):
        PrunePlan.load(path)
