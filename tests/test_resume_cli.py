"""Resume and loading of what the command line trained."""

import pytest
import torch
from cli_runs import quickstart, save_job

from lightning_moe.training.module import RecoveryModule

pytestmark = [
    pytest.mark.resume,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def test_a_run_of_the_command_line_goes_on_and_loads(tmp_path):
    folder = save_job(tmp_path)
    flags = ("--trainer.enable_checkpointing", "true", "--trainer.default_root_dir", str(folder / "logs"))
    flags += ("--trainer.deterministic", "true", "--model.schedule", "constant_with_warmup")
    quickstart(folder, *flags)
    (first,) = (folder / "logs").rglob("*.ckpt")
    loaded = RecoveryModule.load_from_checkpoint(first)
    stored = torch.load(first, weights_only=True)["state_dict"]
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in stored.items())
    quickstart(folder, *flags, "--ckpt_path", str(first), "--trainer.max_steps", "4")
    steps = {torch.load(path, weights_only=True)["global_step"] for path in (folder / "logs").rglob("*.ckpt")}
    assert 4 in steps
