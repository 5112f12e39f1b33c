"""One-shot compression on two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import save_model, save_text

from lightning_moe.evaluation.stages import load_stages
from lightning_moe.files import read_json


@pytest.mark.slow
def test_two_ranks_cut_and_train_alike_and_the_first_one_reports(tmp_path):
    save_text(tmp_path)
    save_model(tmp_path / "model")
    script = Path(__file__).with_name("ddp_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (read_json(tmp_path / f"rank{rank}.json", what="result") for rank in (0, 1))
    assert first == second
    assert set(load_stages(tmp_path / "results")) == {"two", "two_merged"}
