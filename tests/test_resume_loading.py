"""`load_from_checkpoint` and `Trainer.validate` with nothing but the file and the source it names."""

import pytest
import torch
from resume_runs import MODES, foreign_batches, prepare, run
from tiny_models import random_tokens, tiny_model
from tiny_runs import ForeignWithLoader, quiet_trainer, save_model, text_module

from callbacks import ChannelPruning, ExpertCalibration, Recovery
from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.models.discovery import moe_layers
from lightning_moe.training.checkpoint import restore_structure, write_structure
from lightning_moe.training.module import LanguageModelModule, RecoveryModule

pytestmark = [
    pytest.mark.resume,
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # Lightning's remark on `validate` with a checkpoint of callbacks that are not needed.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]

OURS = [mode for mode in MODES if not mode.startswith("foreign")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("loading"))


def logits(module):
    with torch.no_grad():
        return module.language_model.eval()(random_tokens()).logits


def trained(folder, mode, **settings):
    module, trainer, _ = run(mode, folder, name=mode, **settings)
    return module, trainer, folder / mode / "last.ckpt"


def assert_loads(module, path):
    loaded = type(module).load_from_checkpoint(path)
    assert torch.equal(logits(loaded), logits(module))
    mine, theirs = loaded.state_dict(), module.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    return loaded


@pytest.mark.parametrize("mode", ["one_shot", "whole", "norms"])
def test_a_checkpoint_needs_only_its_source(folder, mode):
    module, _, path = trained(folder, mode)
    loaded = assert_loads(module, path)
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in loaded.named_parameters() if parameter.requires_grad] == trainable


@pytest.mark.slow
@pytest.mark.parametrize("mode", OURS)
def test_checkpoints_of_every_mode_need_only_their_source(folder, mode):
    module, _, path = trained(folder, mode)
    assert_loads(module, path)


def test_weights_only_are_enough(folder, tmp_path):
    module, trainer, _ = trained(folder, "one_shot", max_steps=2)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "optimizer_states" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert_loads(module, tmp_path / "weights.ckpt")


def test_validate_needs_no_callbacks(folder):
    module, _, path = trained(folder, "one_shot", limit_val_batches=0)
    bare = quiet_trainer(limit_val_batches=2)
    data = text_module(folder)
    fresh = RecoveryModule(source=str(folder / "model"))
    found = bare.validate(fresh, datamodule=data, ckpt_path=path, verbose=False)
    expected = quiet_trainer(limit_val_batches=2).validate(module, datamodule=data, verbose=False)
    assert found == expected


def test_an_adapter_checkpoint_holds_what_was_learned_and_nothing_else(folder):
    module, _, path = trained(folder, "one_shot", max_steps=2)
    stored = set(torch.load(path, weights_only=True)["state_dict"])
    refitted = {name for name in module.state_dict() if ".experts.base_layer.down_proj." in name}
    assert len(refitted) == 2 * 3  # codes, absmax and scale of two layers
    assert stored == {name for name, p in module.named_parameters() if p.requires_grad} | refitted


def test_without_a_repair_the_base_is_left_out(folder):
    _, _, path = trained(folder, "nf4", max_steps=2)
    assert all("lora_" in name for name in torch.load(path, weights_only=True)["state_dict"])


def test_training_goes_on_from_what_was_loaded(folder):
    _, _, path = trained(folder, "one_shot", max_steps=2)
    loaded = RecoveryModule.load_from_checkpoint(path)
    before = {name: p.detach().clone() for name, p in loaded.named_parameters() if p.requires_grad}
    quiet_trainer(max_steps=2).fit(loaded, datamodule=text_module(folder, validation=None))
    assert any(not torch.equal(p, before[name]) for name, p in loaded.named_parameters() if name in before)


def test_recovery_refuses_a_model_that_has_adapters(folder):
    _, _, path = trained(folder, "one_shot", max_steps=2)
    loaded = RecoveryModule.load_from_checkpoint(path)
    with pytest.raises(ValueError, match=r"has an adapter already, perhaps from `load_from_checkpoint`. Train it with"):
        quiet_trainer([Recovery()]).fit(loaded, datamodule=text_module(folder))


class OtherPeoples(ForeignWithLoader):
    """One line more than without pruning."""

    def __init__(self):
        super().__init__(model=tiny_model(), loader=foreign_batches())

    @property
    def language_model(self):
        return self.lm

    def on_load_checkpoint(self, checkpoint):
        restore_structure(checkpoint, model=self.lm)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_a_foreign_module_loads_with_one_line(tmp_path, with_adapters):
    callbacks = [ExpertCalibration(num_batches=2), ChannelPruning(prune_ratio=0.5, method_args={"align": 8})]
    if with_adapters:
        callbacks.append(Recovery(adapter=AdapterConfig(expert_rank=2)))
    module = OtherPeoples()
    trainer = quiet_trainer(callbacks)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "foreign.ckpt")
    assert_loads(module, tmp_path / "foreign.ckpt")


def changed(path, target, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, target)
    return target


def test_a_damaged_structure_is_refused(folder, tmp_path):
    _, _, path = trained(folder, "one_shot", max_steps=1)
    path = changed(path, tmp_path / "x.ckpt", lambda c: c["lightning_moe"]["structure"].pop("layers"))
    with pytest.raises(ValueError, match=r"does not say what its model looks like: .* must hold exactly the keys"):
        RecoveryModule.load_from_checkpoint(path)


def test_another_source_is_refused(folder, tmp_path):
    _, _, path = trained(folder, "one_shot", max_steps=1)
    source = save_model(tmp_path / "wide", hidden_size=128)
    with pytest.raises(ValueError, match="of another model: the hidden size is 64 there and 128 here"):
        RecoveryModule.load_from_checkpoint(path, source=source)
    source = save_model(tmp_path / "other", seed=1)
    with pytest.raises(
        ValueError, match=r"trained on another `source`: the routers of this one, '.*other', have other"
    ):
        RecoveryModule.load_from_checkpoint(path, source=source)


def test_a_missing_adapter_is_refused(folder, tmp_path):
    _, _, path = trained(folder, "one_shot", max_steps=1)
    path = changed(path, tmp_path / "x.ckpt", lambda c: c["state_dict"].popitem())
    with pytest.raises(ValueError, match=r"other adapters than the model: '.*' is None there and \(.*\) here"):
        RecoveryModule.load_from_checkpoint(path)


def test_a_structure_written_twice_is_written_once():
    model, checkpoint = tiny_model(), {}
    write_structure(checkpoint, model=model)
    once = dict(checkpoint["lightning_moe"])
    write_structure(checkpoint, model=model)
    assert checkpoint == {"lightning_moe": once}


def test_a_checkpoint_without_a_structure_changes_nothing():
    model = tiny_model()
    assert restore_structure({}, model=model) is None
    assert not hasattr(moe_layers(model)[0].experts, "widths")


def test_unpruned_runs_load_as_before(folder, tmp_path):
    module = LanguageModelModule(source=str(folder / "model"), learning_rate=1e-3)
    trainer = quiet_trainer()
    trainer.fit(module, datamodule=text_module(folder, validation=None))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert_loads(module, tmp_path / "plain.ckpt")


@pytest.mark.parametrize("make", [LanguageModelModule, RecoveryModule])
def test_folders_are_saved_as_absolute_paths(folder, tmp_path, monkeypatch, make):
    monkeypatch.chdir(folder)
    teachers = {"teacher": "model"} if make is RecoveryModule else {}
    hparams = make(source="model", **teachers).hparams
    monkeypatch.chdir(tmp_path)
    assert [hparams[name] for name in ("source", *teachers)] == [str(folder / "model")] * (1 + len(teachers))
    for name in ("asset:small_moe", "owner/name"):
        assert make(source=name).hparams["source"] == name


def test_a_checkpoint_loads_in_another_working_directory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    module = LanguageModelModule(source="model", schedule="constant_with_warmup")
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, datamodule=text_module(folder, validation=None))
    trainer.save_checkpoint(tmp_path / "here.ckpt")
    monkeypatch.chdir(tmp_path)
    assert_loads(module, tmp_path / "here.ckpt")


def test_a_folder_that_was_moved_is_named(folder, tmp_path):
    _, _, path = trained(folder, "one_shot", max_steps=1)
    gone = str(tmp_path / "gone")
    path = changed(path, tmp_path / "x.ckpt", lambda c: c["hyper_parameters"].update(source=gone))
    with pytest.raises(
        ValueError, match=r"no model at '.*gone'. If .* moved.*`load_from_checkpoint\(path, source=...\)`"
    ):
        RecoveryModule.load_from_checkpoint(path)
    assert RecoveryModule.load_from_checkpoint(path, source=str(folder / "model")).language_model is not None
