"""Cuts in stages: the budget of one cut, decided on the model as each stage left it."""

import copy
import json

import pytest
import torch
from alike_channels import alike_model
from tiny_models import NUM_EXPERTS, random_tokens, tiny_model

from lightning_moe.allocation import build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.discovery import model_shape, moe_layers
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.repair import plan_repair
from lightning_moe.surgery.stages import cut_in_stages

LOADERS = {"text": [{"input_ids": random_tokens(batch=4, length=32, seed=seed)} for seed in range(3)]}
ARGS = {"align": 8}


def statistics(model):
    return collect_statistics(model, loaders=LOADERS, progress=False)


def staged(model, *, ratio: float = 0.5, **options):
    settings = {"method": "exact_global", "method_args": ARGS, "repair": False} | options
    return cut_in_stages(
        model, prune_ratio=ratio, statistics=statistics(model), loaders=LOADERS, progress=False, **settings
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=random_tokens(seed=9), use_cache=False).logits


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "olmoe"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_budget_is_that_of_one_cut(name, stages):
    model = tiny_model(name)
    one_go = build_method("exact_global", **ARGS).plan(statistics(model), prune_ratio=0.45)
    cut = staged(model, ratio=0.45, stages=stages)
    assert cut.plan.num_kept == one_go.num_kept == model_shape(model).num_channels
    assert len(cut.stages) == stages
    assert cut.plan.shape == one_go.shape
    recorded = json.loads(cut.plan.provenance["stages"])
    assert [stage["prune_ratio"] for stage in recorded] == [stage.prune_ratio for stage in cut.stages]
    assert [stage["statistics"] for stage in recorded] == [stage.provenance["statistics"] for stage in cut.stages]
    assert (cut.plan.prune_ratio, cut.plan.provenance["statistics"]) == (0.45, one_go.provenance["statistics"])
    if stages == 1:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(cut.plan.keep, one_go.keep, strict=True))
    widths = [stage.num_kept for stage in cut.stages]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("method", ["exact_global", "reap"])
def test_the_composed_plan_cuts_the_same_in_one_go(method):
    model, other = tiny_model(), tiny_model()
    cut = staged(model, method=method, method_args=ARGS if method == "exact_global" else {})
    apply_plan(other, plan=cut.plan)
    assert [layer.experts.widths for layer in moe_layers(other)] == [
        layer.experts.widths for layer in moe_layers(model)
    ]
    torch.testing.assert_close(logits(other), logits(model))


def test_the_second_stage_equals_its_steps_by_hand():
    model, by_hand = alike_model(noise=0.3), alike_model(noise=0.3)
    cut = staged(model, repair=True)
    method = build_method("exact_global", **ARGS)
    first = method.plan(statistics(by_hand), prune_ratio=0.25)
    apply_plan(by_hand, plan=first, repair=plan_repair(by_hand, plan=first, loaders=LOADERS, progress=False))
    second = method.plan(statistics(by_hand), prune_ratio=1 - 0.5 / 0.75)
    apply_plan(by_hand, plan=second, repair=plan_repair(by_hand, plan=second, loaders=LOADERS, progress=False))
    assert [stage.digest for stage in cut.stages] == [first.digest, second.digest]
    torch.testing.assert_close(logits(model), logits(by_hand))
    # It matters that the cut model is calibrated anew: one ranking of the whole model chooses otherwise.
    one_go = method.plan(statistics(alike_model(noise=0.3)), prune_ratio=0.5)
    assert any(not torch.equal(mine, theirs) for mine, theirs in zip(cut.plan.keep, one_go.keep, strict=True))


def test_whole_experts_go_in_stages_without_a_repair():
    model = tiny_model()
    cut = staged(model, method="reap", method_args={}, repair=True)
    assert [len(stage.evicted(0)) for stage in cut.stages] == [2, 2]
    assert len(cut.plan.evicted(0)) == NUM_EXPERTS // 2


def test_the_last_stage_alone_is_fitted_to_4_bit():
    model = alike_model(noise=0.3)
    plain, after = copy.deepcopy(model), copy.deepcopy(model)
    digests = [staged(one, repair=repair).stages for one, repair in ((plain, True), (after, "after_nf4"))]
    assert [plan.digest for plan in digests[0]] == [plan.digest for plan in digests[1]]
    rows = [moe_layers(one)[0].experts.down_proj.weight for one in (plain, after)]
    assert not torch.equal(*rows)


def test_too_few_stages_are_refused():
    with pytest.raises(ValueError, match=r"`stages` must be .*>= 1, got 0"):
        staged(tiny_model(), stages=0)
    with pytest.raises(ValueError, match=r"in stages must be in \(0, 1\), got 0: there is nothing to cut"):
        staged(tiny_model(), ratio=0)
    with pytest.raises(ValueError, match=r"`prune_ratio` must be in \[0, 1\), got 1.5"):
        staged(tiny_model(), ratio=1.5)
