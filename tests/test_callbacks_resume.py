"""Checkpoints of a recovery run: adapters only, resumed bit by bit, refused where they do not belong."""

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import quiet_trainer, save_model, save_text, text_module

from callbacks import ChannelPruning, ExpertCalibration, Recovery
from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.training.module import RecoveryModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_text(tmp_path_factory.mktemp("resume"))
    save_model(folder / "model")
    return folder


def fit(folder, *, max_steps, name, ckpt_path=None, entry="fit", prune_ratio=0.5, method="exact_global", rank=2):
    """A recovery run whose learning rate does not depend on where it is to stop."""
    seed_everything(0, verbose=False)  # adapters begin at random
    module = RecoveryModule(
        source=str(folder / "model"), gradient_checkpointing=False, schedule="constant_with_warmup", warmup_ratio=0.0
    )
    callbacks = [
        ExpertCalibration(),
        ChannelPruning(prune_ratio=prune_ratio, method=method, method_args={"align": 8}),
        Recovery(adapter=AdapterConfig(expert_rank=rank, router_rank=2)),
        # Within the epoch: a checkpoint after `max_steps` counts its epoch as done.
        ModelCheckpoint(dirpath=folder / name, every_n_train_steps=1, save_last=True),
    ]
    trainer = quiet_trainer(
        callbacks, max_steps=max_steps, enable_checkpointing=True, deterministic=True, limit_val_batches=1.0
    )
    if entry == "validate":
        trainer.validate(module, datamodule=text_module(folder), ckpt_path=ckpt_path, verbose=False)
    else:
        trainer.fit(module, datamodule=text_module(folder, validation=None), ckpt_path=ckpt_path)
    return module, trainer


@pytest.fixture(scope="module")
def stopped(folder):
    fit(folder, max_steps=2, name="stopped")
    return folder / "stopped" / "last.ckpt"


def test_the_checkpoint_holds_the_adapters_and_nothing_else(folder, stopped):
    checkpoint = torch.load(stopped, weights_only=True)
    names = list(checkpoint["state_dict"])
    assert names
    assert all("lora_" in name for name in names)
    assert stopped.stat().st_size < (folder / "model" / "model.safetensors").stat().st_size / 2


def test_a_resumed_run_ends_with_the_same_weights(folder, stopped):
    whole, _ = fit(folder, max_steps=4, name="whole")
    resumed, trainer = fit(folder, max_steps=4, name="resumed", ckpt_path=stopped)
    assert trainer.global_step == 4
    expected, half = whole.state_dict(), torch.load(stopped, weights_only=True)["state_dict"]
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(value, expected[name]) for name, value in half.items())


def test_validate_with_a_checkpoint_sees_the_trained_adapters(folder, stopped):
    trained, trainer = fit(folder, max_steps=2, name="again")
    validated, other = fit(folder, max_steps=2, name="v", ckpt_path=stopped, entry="validate")
    trainer.validate(trained, datamodule=text_module(folder), verbose=False)
    assert other.callback_metrics["nll"].item() == trainer.callback_metrics["nll"].item()
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    assert all(torch.equal(validated.state_dict()[name], trained.state_dict()[name]) for name in names)


def test_a_checkpoint_of_another_rank_is_refused(folder, stopped):
    with pytest.raises(
        ValueError, match=r"holds other adapters than the model: .* Run `fit` or `validate` with the cal"
    ):
        fit(folder, max_steps=4, name="x", ckpt_path=stopped, rank=3)


def test_a_checkpoint_of_another_cut_is_refused(folder, stopped):
    with pytest.raises(ValueError, match=r"holds other adapters|belongs to another cut"):
        fit(folder, max_steps=4, name="x", ckpt_path=stopped, prune_ratio=0.25)


def test_a_checkpoint_of_another_cut_with_the_same_widths_is_refused(folder):
    fit(folder, max_steps=1, name="uniform", method="uniform")
    checkpoint = torch.load(folder / "uniform" / "last.ckpt", weights_only=True)
    (key,) = [key for key in checkpoint["callbacks"] if key.startswith("ChannelPruning")]
    (plan,) = checkpoint["callbacks"][key]["plans"]
    name = next(iter(plan["keep"]))
    plan["keep"][name] = plan["keep"][name][::-1]  # other channels, same widths
    torch.save(checkpoint, folder / "other.ckpt")
    with pytest.raises(ValueError, match="belongs to another cut than the one just made"):
        fit(folder, max_steps=2, name="x", ckpt_path=folder / "other.ckpt", method="uniform")


def test_loading_without_the_callbacks_is_refused(stopped):
    with pytest.raises(ValueError, match="load what ExportPruned wrote"):
        RecoveryModule.load_from_checkpoint(stopped)
