"""Cuts during training on two processes (started by `test_callbacks_ddp.py`): FOLDER; see `scheduled_runs.py`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
from scheduled_runs import train  # noqa: E402


def main(folder):
    found, trainer = train(folder / "two", size=2)
    resumed, _ = train(folder / "again", size=2, resume=str(folder / "two" / "step=3.ckpt"))
    torch.save({"whole": found, "resumed": resumed}, folder / f"cuts_rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
