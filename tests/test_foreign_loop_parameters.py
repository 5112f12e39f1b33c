"""What other people do to parameters: sharing and hooks are refused where a cut would drop them without a word."""

import pytest
from foreign_modules import channels
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from random_plans import random_plan
from tiny_models import tiny_model
from tiny_runs import ForeignModule, loader_of, quiet_trainer, token_batches

from callbacks import ChannelPruning, ExpertCalibration
from lightning_moe.models.discovery import moe_layers
from lightning_moe.surgery.cut import apply_plan, convert_experts

pytestmark = pytest.mark.foreign_loop


def fit(module, *, callbacks=(), max_steps=4):
    pruning = ChannelPruning(schedule=[(2, 0.5)], method="uniform")
    trainer = quiet_trainer([ExpertCalibration(num_batches=1), pruning, *callbacks], max_steps=max_steps)
    trainer.fit(module, train_dataloaders=loader_of(token_batches()))


def share_experts(model):
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts


def share_one_weight(model):
    model.model.layers[1].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj


def share_router(model):
    model.model.layers[1].mlp.gate.weight = model.model.layers[0].mlp.gate.weight


@pytest.mark.parametrize("share", [share_experts, share_one_weight, share_router])
def test_layers_that_share_weights_are_refused(share):
    model = tiny_model()
    share(model)
    plan = random_plan(model)
    match = (
        r"'model\.layers\.1\..*' shares '.*' with 'model\.layers\.0\..*', and each layer is cut by itself\. Give every"
    )
    with pytest.raises(ValueError, match=match):
        apply_plan(model, plan=plan)
    with pytest.raises(ValueError, match=match):
        convert_experts(model)
    with pytest.raises(ValueError, match=match):
        fit(ForeignModule(model=model))
    assert moe_layers(model)[0].experts.down_proj.shape == (8, 64, 32)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_of_experts_are_refused(register):
    module = ForeignModule()
    getattr(moe_layers(module.lm)[1].experts.gate_up_proj, register)(lambda *_: None)
    match = r"'model\.layers\.1\.mlp\.experts\.gate_up_proj' has a hook on its gradient, which is lost .* Act between"
    with pytest.raises(ValueError, match=match):
        fit(module)


def test_hooks_registered_beside_the_optimizer_are_refused_before_the_first_step():
    class StepsInBackward(ForeignModule):
        def configure_optimizers(self):
            for parameter in self.lm.parameters():
                parameter.register_post_accumulate_grad_hook(lambda _: None)
            return super().configure_optimizers()

    module = StepsInBackward()
    with pytest.raises(ValueError, match="has a hook on its gradient"):
        fit(module)
    assert module.losses == []


def test_hooks_on_other_parameters_stay():
    module, calls = ForeignModule(), []
    module.lm.lm_head.weight.register_hook(lambda grad: calls.append(len(grad)))
    fit(module)
    assert len(calls) == 4
    assert channels(module) == 256


@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: StochasticWeightAveraging(swa_lrs=1e-3)])
def test_running_averages_of_the_weights_are_refused(averaging):
    """They hold a copy of the module in the old shape."""
    with pytest.raises(ValueError, match=r"(Stochastic)?WeightAveraging averages weights .* and `schedule` changes"):
        fit(ForeignModule(), callbacks=[averaging()])
