"""In a transformers `Trainer`: accelerate's wrapped optimizer, accumulation, clipping, evaluation, checkpoints."""

import copy

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from foreign_modules import channels
from tiny_models import tiny_model
from tiny_runs import token_batches
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lightning_moe.models.discovery import moe_layers
from lightning_moe.surgery.pruner import ScheduledPruner

pytestmark = pytest.mark.foreign_loop

SCHEDULE = [(2, 0.25), (4, 0.5)]
CALIBRATION = {"text": token_batches(2, seed=7)}


class Pruning(TrainerCallback):
    """What the README shows, and what it did to the first layer's gate rows."""

    def __init__(self, pruner):
        self.pruner = pruner
        self.before, self.after, self.optimizers, self.rates = {}, {}, [], []

    def on_step_begin(self, args, state, control, *, model, optimizer, lr_scheduler, **kwargs):
        self.optimizers.append(optimizer)
        self.rates.append(lr_scheduler.get_last_lr()[0])
        self.before[state.global_step] = self.copy_of(model, optimizer)
        self.pruner.step(state.global_step, optimizers=[optimizer])
        self.after[state.global_step] = self.copy_of(model, optimizer)

    def copy_of(self, model, optimizer):
        weight = moe_layers(model)[0].experts.gate_proj.weight
        return weight.detach().clone(), copy.deepcopy(optimizer.state.get(weight))


def trainer_of(folder, *, model=None, method="uniform", schedule=SCHEDULE, **settings):
    model = tiny_model().train() if model is None else model
    pruner = ScheduledPruner(
        model,
        schedule=schedule,
        loaders=CALIBRATION,
        method=method,
        method_args={} if method == "reap" else {"align": 8},
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        **({"max_steps": 6, "save_strategy": "no"} | settings),
    )
    rows = [{"input_ids": row, "labels": row} for batch in token_batches(12) for row in batch["input_ids"]]
    pruning = Pruning(pruner)
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[pruning]), pruning


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "eval_strategy": "steps", "eval_steps": 1}
    trainer, pruning = trainer_of(tmp_path_factory.mktemp("trainer"), logging_steps=1, **settings)
    trainer.train()
    return trainer, pruning


def test_the_model_shrinks_at_its_steps(run):
    trainer, pruning = run
    assert [len(pruning.after[step][0]) for step in range(6)] == [256, 256, 192, 192, 128, 128]
    assert channels(trainer.model) == pruning.pruner.plans[-1].num_kept == 256


@pytest.mark.parametrize("cut", [0, 1])
def test_moments_behind_accelerates_wrapper_are_the_rows_that_stay(run, cut):
    _, pruning = run
    step, plan = SCHEDULE[cut][0], pruning.pruner.plans[cut]
    (weight, state), (new_weight, new_state) = pruning.before[step], pruning.after[step]
    assert isinstance(pruning.optimizers[step], AcceleratedOptimizer)
    kept_C = plan.keep[0]  # one width for all: the rows are stored expert by expert
    assert torch.equal(new_weight, weight[kept_C])
    for key in ("exp_avg", "exp_avg_sq"):
        assert float(state[key].abs().max()) > 0
        assert torch.equal(new_state[key], state[key][kept_C])
    assert new_state["step"] == state["step"] == step


def test_weights_and_moments_move_after_the_cut(run):
    _, pruning = run
    for step in (2, 4):
        weight, state = pruning.after[step]
        next_weight, next_state = pruning.before[step + 1]
        assert not torch.equal(weight, next_weight)
        assert not torch.equal(state["exp_avg"], next_state["exp_avg"])
        assert next_state["step"] == step + 1


def test_optimizer_schedule_clipping_and_evaluation_go_on(run):
    trainer, pruning = run
    assert len({id(optimizer) for optimizer in pruning.optimizers}) == 1
    assert pruning.rates == pytest.approx([1e-2 * (1 - step / 6) for step in range(6)])
    history = trainer.state.log_history
    assert len([row for row in history if "eval_loss" in row]) == 6
    assert all(float(row["grad_norm"]) > 0.1 for row in history if "grad_norm" in row)  # before it is clipped
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}


def test_its_checkpoints_are_model_folders(tmp_path):
    trainer, _ = trainer_of(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    assert channels(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")) == 384
    trainer.save_model(str(tmp_path / "final"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    batch = token_batches(1)[0]
    assert torch.equal(reloaded(**batch).logits, trainer.model.eval()(**batch).logits)


def test_whole_experts_leave_too(tmp_path):
    trainer, _ = trainer_of(tmp_path, method="reap", schedule=[(2, 0.25)])
    trainer.train()
    assert [len(layer.router.weight) for layer in moe_layers(trainer.model)] == [6, 6]
    assert all(trainer.optimizer.state[layer.router.weight]["step"] == 6 for layer in moe_layers(trainer.model))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"optim": "adamw_torch_fused", "lr_scheduler_type": "cosine"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
    ],
    ids=str,
)
def test_other_settings_of_the_trainer(tmp_path, settings):
    trainer, pruning = trainer_of(tmp_path, **settings)
    trainer.train()
    assert channels(trainer.model) == 256
    assert not torch.equal(pruning.after[4][0], pruning.before[5][0])
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}


@pytest.mark.parametrize("optim", ["adafactor", "adamw_bnb_8bit", "paged_adamw_32bit"])
def test_optimizers_that_cannot_follow_are_refused_before_the_first_step(tmp_path, optim):
    trainer, _ = trainer_of(tmp_path, optim=optim)
    with pytest.raises(ValueError, match=r"cannot follow a cut during training: it keeps .* Use an optimizer that"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_checkpoint_from_before_a_cut_is_not_loaded_into_the_cut_model(tmp_path):
    """`load_best_model_at_end` goes back to another structure; a learning rate that harms makes the first the best."""
    checkpoints = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer, pruning = trainer_of(tmp_path, load_best_model_at_end=True, **checkpoints)
    pruning.pruner.model.lm_head.register_forward_hook(
        lambda module, inputs, output: output * (1 + trainer.state.global_step)
    )
    with pytest.raises(RuntimeError, match=r"size mismatch for .*experts.gate_proj.weight"):
        trainer.train()


def test_an_optimizer_made_before_the_pruner_is_refused_before_the_first_step():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = ScheduledPruner(model, schedule=SCHEDULE, loaders=CALIBRATION)
    with pytest.raises(ValueError, match=r"The optimizer was made before the pruner, .* Make the optimizer after"):
        pruner.step(0, optimizers=[optimizer])
