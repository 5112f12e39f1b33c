"""What callbacks see of the checkpoint that a run goes on from: read before anything is calibrated, or refused."""

import lightning
import pytest
import torch
from lightning import Callback, Trainer
from resume_runs import ADAPTER, ALIGN, prepare, recovery, run, whole
from tiny_runs import ForeignModule, loader_of, quiet_trainer, text_module, token_batches

from callbacks import ChannelPruning, ExpertCalibration, Recovery
from callbacks._trainer import resumed_checkpoint
from callbacks.exact_resume import ExactResume
from lightning_moe.adapters.inject import AdapterConfig

pytestmark = [
    pytest.mark.resume,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]

LIGHTNING = {"pytorch-lightning_version": lightning.__version__, "callbacks": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp("resume"))
    run("one_shot", folder, name="stopped", max_steps=2)
    run("whole", folder, name="unadapted", max_steps=2)
    return folder


def go_on(folder, callbacks, *, path="stopped/last.ckpt", module=None, **settings):
    trainer = quiet_trainer(callbacks, max_steps=4, **settings)
    module = (module or recovery())(folder)
    trainer.fit(module, datamodule=text_module(folder, validation=None), ckpt_path=str(folder / path))
    return module


def calibrated_cut(**settings):
    return [ExpertCalibration(), ChannelPruning(**({"prune_ratio": 0.5, "method_args": ALIGN} | settings))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"adapter": AdapterConfig(expert_rank=3, router_rank=8, attention_rank=2)},
            r"\{'expert_rank': 3\}.*with \[2\]",
        ),
        (
            {"adapter": ADAPTER, "quantize": "none"},
            r"Recovery has \{'quantize': 'none'\}, .*\['nf4'\]. Resume with the",
        ),
    ],
)
def test_other_settings_of_recovery_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        go_on(folder, [*calibrated_cut(), Recovery(**settings)])


def test_another_cut_is_refused(folder):
    with pytest.raises(ValueError, match=r"'ratio': 0.5.*and this run has ChannelPruning.*'ratio': 0.25"):
        go_on(folder, [*calibrated_cut(prune_ratio=0.25), Recovery(adapter=ADAPTER)])


def test_recovery_is_refused_where_the_checkpoint_has_no_adapter(folder):
    schedule = [ExpertCalibration(), ChannelPruning(schedule=[(1, 0.2), (4, 0.4)], method_args=ALIGN)]
    with pytest.raises(ValueError, match=r"written by a run without Recovery. Leave Recovery out, or start a new run"):
        go_on(folder, [*schedule, Recovery(adapter=ADAPTER)], path="unadapted/last.ckpt", module=whole)


def test_nothing_is_calibrated_again(folder, monkeypatch):
    monkeypatch.setattr("callbacks.calibration.collect_statistics", None)
    monkeypatch.setattr("callbacks.channel_pruning.plan_repair", None)
    module = go_on(folder, [*calibrated_cut(), Recovery(adapter=ADAPTER)])
    assert module.trainer.global_step == 4


def test_a_file_that_is_not_there_is_named_before_anything_is_calibrated(folder):
    with pytest.raises(ValueError, match=r"There is no checkpoint '.*gone.ckpt': there is no such file"):
        go_on(folder, calibrated_cut(), path="gone.ckpt")


@pytest.mark.parametrize("length", [0, 10, 5000, -30])
def test_a_truncated_file_is_named(folder, length):
    whole_file = (folder / "stopped" / "last.ckpt").read_bytes()
    (folder / "half.ckpt").write_bytes(whole_file[:length])
    with pytest.raises(ValueError, match=r"half.ckpt' cannot be read: .*Was the run killed while it was written"):
        go_on(folder, calibrated_cut(), path="half.ckpt")


def test_a_file_of_something_else_is_named(folder):
    torch.save({"weights": 1}, folder / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt' is no checkpoint: Lightning did not write it"):
        go_on(folder, calibrated_cut(), path="other.ckpt")


@pytest.mark.parametrize("callbacks", [calibrated_cut, lambda: [ExactResume()]])
def test_training_does_not_go_on_from_weights_alone(folder, callbacks):
    module = ForeignModule()
    trainer = quiet_trainer()
    trainer.fit(module, loader_of(token_batches()))
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="The checkpoint holds weights only, and training cannot go on from it"):
        quiet_trainer(callbacks()).fit(ForeignModule(), loader_of(token_batches()), ckpt_path=folder / "weights.ckpt")


def test_the_path_is_read_from_names_that_lightning_has():
    """`resumed_checkpoint` looks at the running `Trainer._run`."""
    assert {"self", "ckpt_path", "weights_only"} <= set(Trainer._run.__code__.co_varnames)


class Look(Callback):
    """What a callback's setup sees."""

    def setup(self, trainer, pl_module, stage):
        self.seen = resumed_checkpoint(trainer)


def test_without_a_checkpoint_there_is_none(folder):
    look = Look()
    quiet_trainer([look]).fit(whole(folder), datamodule=text_module(folder, validation=None))
    assert look.seen is None
    assert resumed_checkpoint(quiet_trainer()) is None


def test_the_checkpoint_of_a_requeued_job_is_found(tmp_path):
    torch.save(LIGHTNING | {"step": 7}, tmp_path / "hpc_ckpt_1.ckpt")
    look = Look()
    with pytest.raises(KeyError):  # Lightning's own reading of what is no checkpoint
        quiet_trainer([look], default_root_dir=tmp_path).fit(whole(prepare(tmp_path)), ckpt_path="hpc")
    assert look.seen == LIGHTNING | {"step": 7}


def test_of_a_folder_the_part_that_is_not_tensors_is_read(folder):
    (folder / "shards").mkdir()
    torch.save(LIGHTNING | {"step": 8}, folder / "shards" / "meta.pt")
    trainer = quiet_trainer()
    trainer.ckpt_path = folder / "shards"
    assert resumed_checkpoint(trainer) == LIGHTNING | {"step": 8}


def test_a_remote_file_is_read():
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://there.ckpt", "wb") as file:
        torch.save(LIGHTNING | {"step": 9}, file)
    trainer = quiet_trainer()
    trainer.ckpt_path = "memory://there.ckpt"
    assert resumed_checkpoint(trainer) == LIGHTNING | {"step": 9}


def test_exact_resume_stands_first_and_once(folder):
    trainer = quiet_trainer([*calibrated_cut(), Recovery(adapter=ADAPTER)])
    trainer.fit(recovery()(folder), datamodule=text_module(folder, validation=None))
    assert [isinstance(callback, ExactResume) for callback in trainer.callbacks].index(True) == 0
    assert sum(isinstance(callback, ExactResume) for callback in trainer.callbacks) == 1
