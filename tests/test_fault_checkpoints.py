"""A checkpoint is whole or not there, wherever the temporary folder of the system lies."""

import errno
import os
import signal
import tempfile

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import nn

from callbacks.exact_resume import ExactResume
from lightning_moe.files import write_atomically
from lightning_moe.training.checkpoint_writing import WholeCheckpoints

pytestmark = pytest.mark.fault

SAVE = torch.save


class Module(LightningModule):
    """Something to save."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Linear(2, 2)


@pytest.fixture
def path(tmp_path):
    """A checkpoint of an earlier step, and a new one about to take its name."""
    file = tmp_path / "run" / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1, "weights": torch.ones(10_000)}, file)
    return file


def half(content, file):
    """As much as fits."""
    SAVE(content, file)
    file.truncate(file.tell() // 2)
    file.flush()


def test_a_full_disk_leaves_the_checkpoint_before(path, monkeypatch):
    def save(content, file):
        half(content, file)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(
        ValueError, match=r"last\.ckpt' cannot be written: No space left on device\. What had that name is as"
    ):
        WholeCheckpoints().save_checkpoint({"step": 2}, path)
    assert torch.load(path)["step"] == 1
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_a_kill_in_mid_write_leaves_the_checkpoint_before(path, monkeypatch):
    def save(content, file):
        half(content, file)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        torch.save = save
        WholeCheckpoints().save_checkpoint({"step": 2}, path)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert torch.load(path)["step"] == 1
    WholeCheckpoints().save_checkpoint({"step": 3}, path)
    assert torch.load(path)["step"] == 3
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_what_the_archive_says_in_place_of_the_disk_is_told_as_the_disk(path, monkeypatch):
    class FullError(OSError):
        pass

    def save(content, file):
        try:
            raise FullError(errno.ENOSPC, "No space left on device")
        except FullError as error:
            raise RuntimeError("unexpected pos 704 vs 598") from error

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(ValueError, match=r"cannot be written: .*No space left on device"):
        WholeCheckpoints().save_checkpoint({"step": 2}, path)


def test_a_full_disk_names_the_file(path):
    with (
        pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*rows\.json'"),
        write_atomically(path.with_name("rows.json")),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_errors_of_the_content_stay(path):
    with pytest.raises((AttributeError, RuntimeError, TypeError), match=r"lambda|pickle"):
        WholeCheckpoints().save_checkpoint({"step": lambda: 2}, path)
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_trainer_of_ours_never_writes_to_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    ExactResume().attach(trainer)
    assert type(trainer.strategy.checkpoint_io) is WholeCheckpoints
    trainer.strategy.connect(Module())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "state_dict" in torch.load(tmp_path / "a.ckpt", weights_only=True)


def test_a_chosen_plugin_stays():
    chosen = AsyncCheckpointIO()
    trainer = Trainer(accelerator="cpu", logger=False, plugins=[chosen], enable_progress_bar=False)
    ExactResume().attach(trainer)
    assert trainer.strategy.checkpoint_io is chosen
