"""A pruned model is pruned again: in memory, from its folder, in 16 bit and packed.  E experts, C channels."""

import pytest
import torch
from pruned_models import cut_model, loaded, logits, pruned_folder
from random_plans import random_plan
from tiny_models import FAMILY_NAMES, random_tokens, tiny_model
from tiny_runs import token_batches

from lightning_moe.allocation import build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.channel_experts import PROJECTIONS
from lightning_moe.models.discovery import expert_matrices, model_shape, moe_layers
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan, convert_experts

IDS = random_tokens()
pytestmark = pytest.mark.filterwarnings("ignore:.*falling back.*")


def plan_of(model, *, prune_ratio, method="exact_global"):
    statistics = collect_statistics(model, loaders={"text": token_batches(2)}, progress=False)
    settings = {"align": 4} if method == "exact_global" else {}
    return build_method(method, **settings).plan(statistics, prune_ratio=prune_ratio)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_two_rounds_leave_the_rows_that_both_keep(name, packed, tmp_path):
    """Round one, a folder, stock loading, statistics, a plan of 25 %, round two: rows against the unpruned model's."""
    dense = tiny_model(name)
    first = random_plan(dense, evicted=((1,), (2,)))
    convert_experts(dense)
    if packed:
        quantize_model(dense)
    model = loaded(pruned_folder(tmp_path / "once", name, packed=packed))
    second = plan_of(model, prune_ratio=0.25)
    assert second.achieved_prune_ratio == pytest.approx(0.25, abs=0.02)
    apply_plan(model, plan=second)
    save_ragged(model, tmp_path / "twice")
    twice = loaded(str(tmp_path / "twice"))
    assert torch.equal(logits(twice, IDS), logits(model, IDS))
    for index, (layer, whole) in enumerate(zip(moe_layers(twice), moe_layers(dense), strict=True)):
        masks = first.keep[index].split(32)
        left = [e for e, mask in enumerate(masks) if mask.any()]
        again = second.keep[index].split([int(masks[e].sum()) for e in left])
        kept = [(e, mask) for e, mask in zip(left, again, strict=True) if mask.any()]
        assert layer.experts.widths == tuple(int(mask.sum()) for _, mask in kept)
        assert index + 1 not in left
        for position, (e, mask) in enumerate(kept):
            found = expert_matrices(layer.experts, position, dtype=torch.float32)
            expected = expert_matrices(whole.experts, e, dtype=torch.float32)
            for found_nH, expected_nH in zip(found, expected, strict=True):
                assert torch.equal(found_nH, expected_nH[masks[e]][mask])


@pytest.mark.parametrize("name", ["deepseek_v2_grouped", "deepseek_v3_grouped", "glm4_moe_grouped"])
def test_experts_that_a_grouped_router_lost_stay_lost(name, tmp_path):
    model = loaded(pruned_folder(tmp_path / "once", name))
    second = plan_of(model, prune_ratio=0.25)
    assert [layer.widths[expert] for layer, expert in zip(second.shape.layers, (1, 2), strict=True)] == [0, 0]
    assert second.evicted(0) == ()
    apply_plan(model, plan=second)
    save_ragged(model, tmp_path / "twice")
    twice = loaded(str(tmp_path / "twice"))
    chosen = {}
    for layer in moe_layers(twice):
        layer.experts.register_forward_pre_hook(
            lambda module, inputs, index=layer.index: chosen.update({index: set(inputs[1].unique().tolist())})
        )
    many = random_tokens(batch=4, length=64)
    assert torch.equal(logits(twice, many), logits(model, many))
    assert 1 not in chosen[0]
    assert 2 not in chosen[1]


@pytest.mark.parametrize("packed", [False, True])
def test_whole_experts_in_both_rounds(packed, tmp_path):
    model = loaded(pruned_folder(tmp_path / "once", "qwen3_moe", packed=packed))
    second = plan_of(model, prune_ratio=0.3, method="reap")
    apply_plan(model, plan=second)
    survivors = [len(layer.widths) - len(second.evicted(index)) for index, layer in enumerate(second.shape.layers)]
    assert [layer.experts.num_experts for layer in moe_layers(model)] == survivors
    assert [len(layer.router.weight) for layer in moe_layers(model)] == survivors
    assert max(survivors) < 7
    save_ragged(model, tmp_path / "twice")
    assert torch.equal(logits(loaded(str(tmp_path / "twice")), IDS), logits(model, IDS))


def test_ratios_count_from_what_is_left_and_the_summary_says_so():
    dense, model = tiny_model(), cut_model("qwen3_moe")
    second = plan_of(model, prune_ratio=0.25)
    left = model_shape(model).num_channels
    assert left < 512
    assert second.num_kept == pytest.approx(0.75 * left, abs=4)
    said = "channels stay; the model was cut before, and ratios count from what was left"
    assert f"{second.num_kept} of {left} {said}" in second.summary()
    assert "cut before" not in plan_of(dense, prune_ratio=0.25).summary()


def test_the_plan_of_the_unpruned_model_is_refused_by_the_pruned_one():
    dense = tiny_model()
    plan, model = plan_of(dense, prune_ratio=0.25), cut_model("qwen3_moe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"cut already: it has \d+ channels and the plan is for 512. .* as it is now"):
        apply_plan(model, plan=plan)
    apply_plan(dense, plan=plan)
    with pytest.raises(ValueError, match="cut already: it has 384 channels and the plan is for 512"):
        apply_plan(dense, plan=plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_packed_rows_are_selected_bit_for_bit():
    model = cut_model("qwen3_moe", packed=True)
    plan, layer = random_plan(model, seed=5), moe_layers(model)[0]
    before = {name: dict(layer.experts.projection(name).named_parameters()) for name in PROJECTIONS}
    order_C, widths = layer.experts.storage_order(), layer.experts.widths
    apply_plan(model, plan=plan)
    after = moe_layers(model)[0].experts
    for name in PROJECTIONS:
        for part, value in after.projection(name).named_parameters():
            kept = [rows[mask] for rows, mask in zip(order_C.split(widths), plan.keep[0].split(widths), strict=True)]
            expected = before[name][part][torch.cat(kept)]
            assert torch.equal(value[after.storage_order()], expected)
