"""The callbacks in LightningModules that are not ours: each is cut, goes on training, and is left as it was found."""

import pytest
import torch
from foreign_modules import (
    Agent,
    BuiltLate,
    Compiled,
    PartlyFrozen,
    Reloadable,
    TupleBatches,
    TwoOptimizers,
    channels,
    num_hooks,
)
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import tiny_model
from tiny_runs import ForeignModule, loader_of, quiet_trainer, token_batches

from callbacks import ChannelPruning, ExpertCalibration, ExpertPruning
from lightning_moe.models.discovery import find_language_model, moe_layers
from lightning_moe.training.checkpoint import restore_structure

pytestmark = pytest.mark.foreign_loop

SCHEDULE = [(2, 0.25), (4, 0.5)]
NUM_CHANNELS = 2 * 8 * 32


class Weights(Callback):
    """Copies of the first layer's gate rows as each batch begins, behind the pruning."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        experts = moe_layers(find_language_model(pl_module))[0].experts
        self.seen.append(experts.gate_proj.weight.detach().clone())


def fit(module, *, method="exact_global", schedule=SCHEDULE, max_steps=7, callbacks=(), batches=None, **settings):
    """Trains and cuts; returns the trainer, the pruning callback and the weights seen."""
    pruning, weights = ChannelPruning(schedule=schedule, method=method), Weights()
    trainer = quiet_trainer(
        [ExpertCalibration(num_batches=2), pruning, weights, *callbacks], max_steps=max_steps, max_epochs=-1, **settings
    )
    trainer.fit(module, train_dataloaders=loader_of(token_batches(8) if batches is None else batches))
    return trainer, pruning, weights.seen


def check_parameters(module, trainer):
    """What optimizers hold is in the module, and every parameter of the module that is trained has its gradients."""
    own = {id(parameter) for parameter in module.parameters()}
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert held <= own
    assert all(id(p) in own for optimizer in trainer.optimizers for p in optimizer.state)
    return held


def check_cut_and_trained(module, pruning, seen, *, hooks=0):
    assert channels(module) == pruning.plans[-1].num_kept == NUM_CHANNELS // 2
    assert not torch.equal(seen[-1], seen[-2])
    assert len(seen[-1]) == len(seen[-2]) == len(moe_layers(find_language_model(module))[0].experts.gate_proj.weight)
    assert num_hooks(module) == hooks


def test_manual_optimization_with_two_optimizers_accumulation_and_clipping():
    """`trainer.global_step` counts the steps of both optimizers: two for two batches."""
    module = TwoOptimizers()
    trainer, pruning, seen = fit(module, max_steps=8, schedule=[(2, 0.25), (4, 0.5)])
    check_cut_and_trained(module, pruning, [seen[4], seen[6]])
    assert len(seen[1]) > len(seen[2]) >= len(seen[4]) > 0
    assert check_parameters(module, trainer) == {id(p) for p in module.lm.parameters()}
    assert len(module.norms) == 4
    assert min(module.norms) > 0
    sgd, adamw = trainer.optimizers
    assert [group["lr"] for group in (*sgd.param_groups, *adamw.param_groups)] == [1e-2 / 16, 1e-3 / 16]
    for layer in moe_layers(module.lm):
        weight = layer.experts.down_proj.weight
        assert sgd.state[weight]["momentum_buffer"].shape == weight.shape


def test_a_model_built_in_configure_model_is_built_once():
    module = BuiltLate()
    trainer, pruning, seen = fit(module)
    check_cut_and_trained(module, pruning, seen)
    assert module.num_built == 1
    assert check_parameters(module, trainer) == {id(p) for p in module.lm.parameters()}


def test_a_model_deep_inside_a_module_that_trains_more_than_it():
    untouched, module = Agent(), Agent()
    untouched.training_step(token_batches(1)[0], 0)  # transformers' own hooks for `output_hidden_states`
    critic = module.agent["critic"].weight.detach().clone()
    trainer, pruning, seen = fit(module)
    check_cut_and_trained(module, pruning, seen, hooks=num_hooks(untouched))
    assert check_parameters(module, trainer) == {id(p) for p in module.parameters()}
    assert not torch.equal(module.agent["critic"].weight, critic)


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "deepseek_v3", "olmoe"])
def test_other_families(name):
    module = ForeignModule(name)
    _, pruning, seen = fit(module)
    check_cut_and_trained(module, pruning, seen)


def test_experts_of_a_grouped_router_are_masked_and_never_chosen():
    module = ForeignModule("deepseek_v3_grouped", model=tiny_model("deepseek_v3_grouped", n_group=2, topk_group=1))
    callbacks = [ExpertCalibration(num_batches=2), ExpertPruning(schedule=[(2, 0.25)])]
    trainer = quiet_trainer(callbacks, max_steps=5)
    trainer.fit(module, train_dataloaders=loader_of(token_batches()))
    chosen = []
    for layer in moe_layers(module.lm):
        assert sorted(layer.experts.widths)[:3] == [0, 0, 32]
        hook = layer.experts.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1].unique().tolist()))
        module.lm(**token_batches(1)[0])
        hook.remove()
        assert not {e for e, width in enumerate(layer.experts.widths) if width == 0} & set(chosen.pop())
    check_parameters(module, trainer)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied):
    module = ForeignModule(model=tiny_model(tie_word_embeddings=tied))
    trainer, pruning, seen = fit(module)
    check_cut_and_trained(module, pruning, seen)
    assert (module.lm.lm_head.weight is module.lm.get_input_embeddings().weight) == tied
    check_parameters(module, trainer)


def test_a_model_with_two_names_stays_one_model():
    module = ForeignModule()
    module.alias = module.lm
    _, pruning, seen = fit(module)
    check_cut_and_trained(module, pruning, seen)
    assert module.alias is module.lm


def test_a_decoder_layer_that_is_used_twice_is_cut_once():
    module = ForeignModule()
    module.lm.model.layers[1] = module.lm.model.layers[0]
    _, pruning, seen = fit(module)
    assert channels(module) == pruning.plans[-1].num_kept == NUM_CHANNELS // 4
    assert module.lm.model.layers[1] is module.lm.model.layers[0]
    assert not torch.equal(seen[-1], seen[-2])


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("trained", [(".experts.",), (".gate.",), ("lm_head",)], ids=["experts", "routers", "head"])
def test_frozen_or_left_out_parts_stay_as_they_were_and_the_others_move(trained, freeze):
    module = PartlyFrozen(trained=trained, freeze=freeze)
    trainer, pruning, seen = fit(module, method="uniform", schedule=[(4, 0.5)])  # which evicts no expert
    assert channels(module) == pruning.plans[-1].num_kept == NUM_CHANNELS // 2
    held = check_parameters(module, trainer)
    stock = dict(tiny_model().named_parameters())
    for name, parameter in module.lm.named_parameters():
        assert (id(parameter) in held) == module.is_trained(name)
        assert parameter.requires_grad == (module.is_trained(name) or not freeze)
        if not module.is_trained(name) and ".experts." not in name:
            assert torch.equal(parameter, stock[name])
    assert torch.equal(seen[-1], seen[-2]) == (".experts." not in trained)


def compiled_module(how):
    """A module, and what is given to `Trainer.fit`: with the model, its forward or the whole compiled."""
    module = Compiled() if how == "attribute" else ForeignModule()
    if how == "in place":
        module.lm.compile(backend="eager")
    elif how == "forward":
        module.lm.model.forward = torch.compile(module.lm.model.forward, backend="eager")
    return module, torch.compile(module, backend="eager") if how == "whole" else module


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("how", ["attribute", "in place", pytest.param("forward", marks=pytest.mark.slow), "whole"])
def test_compiled_modules_are_cut_too(how):
    module, given = compiled_module(how)
    _, pruning, seen = fit(given)
    check_cut_and_trained(module, pruning, seen)
    eager = ForeignModule()
    fit(eager)
    assert module.losses == pytest.approx(eager.losses, rel=1e-4)


def test_two_transformers_models_are_refused():
    module = ForeignModule()
    module.reference = tiny_model()
    with pytest.raises(ValueError, match=r"exactly one transformers model inside ForeignModule, found 2"):
        fit(module)


def test_batches_that_are_no_dicts_are_refused_before_the_first_step():
    batches = [(batch["input_ids"], batch["attention_mask"]) for batch in token_batches(4)]
    module = TupleBatches()
    with pytest.raises(ValueError, match=r"batches that are dicts with `input_ids`, got (tuple|list)"):
        fit(module, batches=batches)
    assert module.losses == []


def test_a_window_of_batches_that_are_no_dicts_is_refused_at_the_first():
    batches = [(batch["input_ids"], batch["attention_mask"]) for batch in token_batches(4)]
    trainer = quiet_trainer([ExpertCalibration(window=2), ChannelPruning(schedule=SCHEDULE)], max_steps=4)
    with pytest.raises(ValueError, match=r"`window` needs training batches that are dicts with `input_ids`, got"):
        trainer.fit(TupleBatches(), train_dataloaders=loader_of(batches))


def test_no_hook_is_left_when_training_fails():
    class Failing(ForeignModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("somebody's own mistake")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(RuntimeError, match="somebody's own mistake"):
        fit(module)
    assert num_hooks(module) == 0
    assert channels(module) == NUM_CHANNELS * 3 // 4


def test_load_from_checkpoint_of_a_foreign_module_by_one_line(tmp_path):
    module = Reloadable()
    fit(module, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True)], enable_checkpointing=True)
    loaded = Reloadable.load_from_checkpoint(tmp_path / "last.ckpt")
    assert channels(loaded) == NUM_CHANNELS // 2
    expected = module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_the_same_where_the_model_is_built_in_configure_model(tmp_path):
    class ReloadableLate(BuiltLate):
        def on_load_checkpoint(self, checkpoint):
            self.configure_model()
            restore_structure(checkpoint, model=self.lm)

    module = ReloadableLate()
    fit(module, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True)], enable_checkpointing=True)
    loaded = ReloadableLate.load_from_checkpoint(tmp_path / "last.ckpt")
    assert channels(loaded) == NUM_CHANNELS // 2
    assert loaded.num_built == 1


def test_plain_save_pretrained_after_the_run(tmp_path):
    module = ForeignModule()
    fit(module)
    module.lm.save_pretrained(tmp_path)
    reloaded = type(module.lm).from_pretrained(tmp_path)
    assert channels(reloaded) == NUM_CHANNELS // 2
    batch = token_batches(1)[0]
    assert torch.equal(reloaded(**batch).logits, module.lm.eval()(**batch).logits)
