"""ScheduledPruner in a plain PyTorch loop: no Lightning, no CLI."""

import logging

import pytest
import torch
from adapted_cases import adapted_model
from family_cases import Case
from peft import LoraConfig, PeftModel, get_peft_model
from random_plans import uniform_plan
from tiny_models import random_tokens, tiny_model
from tiny_runs import token_batches
from torch import nn

from lightning_moe.adapters import AdapterConfig, inject_adapters, merge_adapters
from lightning_moe.allocation import build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.discovery import model_shape, moe_layers
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.feasibility import remaining_ratio, unpruned_shape
from lightning_moe.surgery.pruner import ScheduledPruner
from lightning_moe.surgery.schedule import GradualSchedule, PruneSchedule

pytestmark = pytest.mark.schedule
SCHEDULE = [(2, 0.25), (4, 0.5)]
LOADERS = {"text": token_batches(2, seed=7)}


def make(model, **overrides):
    settings = {"schedule": SCHEDULE, "loaders": LOADERS, "method_args": {"align": 8}} | overrides
    return ScheduledPruner(model, **settings)


def num_channels(model):
    return model_shape(model).num_channels


def train(model, pruner, optimizer, *, steps=range(6), micro_batches=1):
    """A plain loop with accumulation and clipping; returns the plans by step."""
    done = {}
    batches = token_batches(len(steps) * micro_batches)
    for position, batch in enumerate(batches):
        step = steps[position // micro_batches]
        plan = pruner.step(step, optimizers=[optimizer])
        if plan is not None:
            done[step] = plan
        model(**batch).loss.backward()
        if position % micro_batches == micro_batches - 1:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return done


@pytest.mark.parametrize("schedule", [SCHEDULE, PruneSchedule(cuts=tuple(SCHEDULE))])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_plain_loop(schedule, micro_batches):
    model = tiny_model().train()
    pruner = make(model, schedule=schedule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    done = train(model, pruner, optimizer, micro_batches=micro_batches)
    assert list(done) == [2, 4]
    assert [plan.num_kept for plan in pruner.plans] == [384, 256]
    assert list(done.values()) == pruner.plans
    assert num_channels(model) == 256
    assert pruner.reached_ratio == 0.5
    assert {int(state["step"]) for state in optimizer.state.values()} == {6}
    assert all(module.training for module in model.modules())


def test_a_cut_changes_nothing_but_the_cut():
    """The plan is that of a calibration by hand at that moment, and no random number is drawn."""
    model = tiny_model().train()
    pruner = make(model, method="exact_global")
    before = torch.random.get_rng_state()
    statistics = collect_statistics(model, loaders=LOADERS, progress=False)
    expected = build_method("exact_global", align=8).plan(statistics, prune_ratio=0.25)
    plan = pruner.step(2, optimizers=[])
    assert plan.digest == expected.digest
    assert torch.equal(torch.random.get_rng_state(), before)
    assert pruner.step(2, optimizers=[]) is None
    assert pruner.due(3) is None
    assert pruner.due(4) == 0.5


@pytest.mark.parametrize("quantize", [False, True])
def test_training_adapters_while_experts_shrink(quantize):
    """DoRA on experts and router, NF4 or not: the base never changes, adapters go on, and merging is still exact."""
    model = tiny_model()
    pruner = make(model, schedule=GradualSchedule(shape="cubic", begin=0, end=4, num_cuts=2, prune_ratio=0.5))
    if quantize:
        quantize_model(model)
    torch.manual_seed(0)
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=2, train_norms=True)).train()
    settings = peft_model.peft_config["default"].to_dict()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    done = train(peft_model, pruner, optimizer)
    assert list(done) == [2, 4]
    assert num_channels(model) == 256
    assert peft_model.peft_config["default"].to_dict() == settings
    assert {int(state["step"]) for state in optimizer.state.values()} == {6}
    assert isinstance(peft_model, PeftModel)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in peft_model.parameters() if p.requires_grad}
    peft_model.eval()
    with torch.no_grad():
        adapted = peft_model(input_ids=random_tokens()).logits
        merged = merge_adapters(peft_model, dtype=torch.float32)(input_ids=random_tokens()).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-5)


def test_the_decision_is_made_on_the_adapted_model():
    """An adapter that undoes a channel's use makes it go, whatever its base weights are."""
    model = adapted_model(Case(name="qwen3_moe"), packed=False)
    layer = moe_layers(model)[0]
    slot = layer.base_experts.slot_order.index(3)
    layer.experts.lora_magnitude_down["default"].data[slot] = 0  # expert 3 gives nothing any more
    plan = make(model, schedule=[(0, 0.1)]).step(0, optimizers=[])
    assert plan.widths(0)[3] == 0


def test_ratios_count_from_the_unpruned_model():
    model = tiny_model().train()
    apply_plan(model, plan=uniform_plan(model, width=24))  # a quarter is gone: 384 of 512
    assert unpruned_shape(model).num_channels == 512
    assert remaining_ratio(model, prune_ratio=0.5) == pytest.approx(1 / 3)
    assert remaining_ratio(model, prune_ratio=0.25) == 0.0
    pruner = make(model)
    assert pruner.num_channels == 512
    assert pruner.step(2, optimizers=[]) is None  # nothing left to do
    assert pruner.reached_ratio == 0.25
    assert pruner.step(4, optimizers=[]).num_kept == 256


def test_overdue_cuts_are_one():
    pruner = make(tiny_model().train())
    assert pruner.step(9, optimizers=[]).num_kept == 256
    assert len(pruner.plans) == 1


def test_one_line_says_what_a_cut_did(caplog):
    model = tiny_model().train()
    pruner = make(model)
    optimizers = [torch.optim.SGD(model.parameters())]
    pruner.step(0, optimizers=optimizers)
    with caplog.at_level(logging.INFO):
        pruner.step(2, optimizers=optimizers)
        pruner.step(4, optimizers=optimizers)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("Step 2: 384 of 512 channels kept (75.0 %)")
    assert "experts evicted; calibration " in lines[1]
    assert lines[1].endswith(" s of training before it.")


def test_state_goes_on_in_another_process():
    model = tiny_model().train()
    pruner = make(model)
    pruner.step(2, optimizers=[])
    state = pruner.state_dict()
    assert all(isinstance(value, int | list | dict) for value in state.values())
    other = tiny_model().train()
    resumed = make(other)
    with pytest.raises(ValueError, match=r"The model has 512 channels, and 384 were left when this state was saved"):
        resumed.load_state_dict(state)
    apply_plan(other, plan=pruner.plans[0])
    resumed.load_state_dict(state)
    assert resumed.num_channels == 512
    assert resumed.due(3) is None
    assert resumed.step(4, optimizers=[]).digest == pruner.step(4, optimizers=[]).digest


@pytest.mark.parametrize("change", [{"schedule": [(2, 0.25)]}, {"method": "uniform"}, {"method_args": {"align": 16}}])
def test_a_state_of_other_settings_is_refused(change):
    state = make(tiny_model()).state_dict()
    with pytest.raises(ValueError, match=r"The checkpoint was made with the pruning settings .*, got .* Resume with"):
        make(tiny_model(), **change).load_state_dict(state)


def test_an_optimizer_made_before_the_pruner_is_refused():
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = make(model)
    with pytest.raises(ValueError, match=r"The optimizer was made before the pruner.*Make the optimizer after the pru"):
        pruner.step(0, optimizers=[optimizer])


def test_an_optimizer_that_cannot_follow_is_refused_at_the_first_step():
    model = tiny_model().train()
    pruner = make(model)
    with pytest.raises(ValueError, match=r"^Adafactor cannot follow a cut during training"):
        pruner.step(0, optimizers=[torch.optim.Adafactor(model.parameters())])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"schedule": [(1, 0.9)], "method": "reap", "method_args": None},
            r"leaves 1 of 8 experts, but 2 must stay \(t",
        ),
        ({"schedule": [(1, 0.98)]}, "leaves 1 blocks of 8 channels, but 4 experts must keep one"),
        ({"loaders": {"text": iter([])}}, "'text' is a list_iterator, which can be read only once"),
        ({"schedule": []}, "`schedule` must be .* pairs, both strictly ascending"),
        ({"method": "nonsense"}, "`method` must be a PruningMethod without settings or one of"),
    ],
)
def test_what_cannot_work_is_refused_before_training(settings, match):
    with pytest.raises(ValueError, match=match):
        make(tiny_model(), **settings)


def test_no_text_to_calibrate_on():
    pruner = make(tiny_model(), loaders=None)
    with pytest.raises(ValueError, match="A cut is due and there is no text to calibrate on: give the pruner `load"):
        pruner.step(2, optimizers=[])


def test_adapters_that_are_not_ours_are_refused():
    model = tiny_model()
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])
    get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"mlp.gate' is wrapped in a ModulesToSaveWrapper, whose parameters cannot"):
        make(model)
