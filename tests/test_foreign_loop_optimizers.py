"""Every optimizer goes on over a cut as if the channels that left had been held at zero in the stock model.

The reference knows nothing of this package: transformers' own model and experts, the same optimizer, and after the step
of the cut the removed channels set to zero after each step. In float64, so that equal means equal.
L layers, E experts, n channels of an expert, H hidden.
"""

from itertools import pairwise

import pytest
import torch
from tiny_models import tiny_model
from tiny_runs import token_batches

from lightning_moe.models.discovery import moe_layers
from lightning_moe.surgery.pruner import ScheduledPruner

pytestmark = pytest.mark.foreign_loop

CUT_AT, NUM_STEPS = 3, 6
SCHEDULE = [(CUT_AT, 0.5)]
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, foreach=False),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, lr=1e-3, foreach=True),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
    "adam amsgrad": lambda groups: torch.optim.Adam(groups, lr=1e-3, amsgrad=True),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=1e-3),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=1e-3),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=1e-3),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.1),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-3),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-4, momentum=0.9, centered=True),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=1e-4),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=1e-2),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2),
    "sgd momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
}


def groups_of(model):
    """Experts decayed and everything else not, with different rates."""
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    rest = [p for name, p in model.named_parameters() if ".experts." not in name]
    return [{"params": experts, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def one_step(model, optimizer, batch):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def pruned_run(build):
    """The cut model, its optimizer, its losses and the plan; every step but the cut is a stranger's."""
    model = tiny_model(dtype=torch.float64).train()
    pruner = ScheduledPruner(
        model, schedule=SCHEDULE, method="uniform", method_args={"align": 8}, loaders={"text": token_batches(2, seed=7)}
    )
    optimizer = build(groups_of(model))
    losses = []
    for step, batch in enumerate(token_batches(NUM_STEPS)):
        pruner.step(step, optimizers=[optimizer])
        losses.append(one_step(model, optimizer, batch))
    (plan,) = pruner.plans
    return model, optimizer, losses, plan


def held_at_zero(model, plan):
    """Zeroes what the plan removed: its rows of gate and up, and its columns of down."""
    for layer, keep_C in zip(moe_layers(model), plan.keep, strict=True):
        keep_En = keep_C.view(8, 32)
        for keep_n, gate_up_mH, down_Hn in zip(
            keep_En, layer.experts.gate_up_proj.data, layer.experts.down_proj.data, strict=True
        ):
            gate_up_mH[torch.cat([~keep_n, ~keep_n])] = 0
            down_Hn[:, ~keep_n] = 0


def masked_run(build, plan):
    model = tiny_model(dtype=torch.float64).train()
    optimizer = build(groups_of(model))
    losses = []
    for step, batch in enumerate(token_batches(NUM_STEPS)):
        if step >= CUT_AT:
            held_at_zero(model, plan)
        losses.append(one_step(model, optimizer, batch))
    held_at_zero(model, plan)
    return model, optimizer, losses


def kept_rows(gate_up_ENH, down_EHn, keep_C):
    """Rows of gate, up and transposed down that the plan keeps, expert by expert."""
    gate_EnH, up_EnH = gate_up_ENH.chunk(2, dim=1)
    return [part.reshape(-1, part.shape[-1])[keep_C] for part in (gate_EnH, up_EnH, down_EHn.transpose(1, 2))]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_in_a_masked_stock_model(name):
    model, optimizer, losses, plan = pruned_run(OPTIMIZERS[name])
    masked, masked_optimizer, masked_losses = masked_run(OPTIMIZERS[name], plan)
    assert plan.num_kept == 256
    assert losses == pytest.approx(masked_losses, rel=1e-9)
    assert all(earlier != later for earlier, later in pairwise(losses))
    for layer, stock, keep_C in zip(moe_layers(model), moe_layers(masked), plan.keep, strict=True):
        expected = kept_rows(stock.experts.gate_up_proj.data, stock.experts.down_proj.data, keep_C)
        ours = [layer.experts.projection(p).weight for p in ("gate_proj", "up_proj", "down_proj")]
        for found, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(found.data, wanted, rtol=1e-7, atol=1e-10)
        gate_up, down = (masked_optimizer.state[p] for p in stock.experts.parameters())
        for key in (key for key, value in down.items() if torch.is_tensor(value) and value.numel() > 1):
            expected = kept_rows(gate_up[key], down[key], keep_C)
            for found, wanted in zip([optimizer.state[p][key] for p in ours], expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "sgd momentum"])
def test_groups_keep_their_settings_and_hold_what_the_model_holds(name):
    model, optimizer, _, _ = pruned_run(OPTIMIZERS[name])
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == {id(p) for p in model.parameters()}
    assert decays == {id(p): 0.1 if ".experts." in key else 0.0 for key, p in model.named_parameters()}
    assert {id(p) for p in optimizer.state} <= decays.keys()
