"""What several processes do together without Lightning (started by `test_processes.py`): FOLDER RANK SIZE."""

import sys
from datetime import timedelta
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
from processes_cases import CALIBRATIONS, labels_of, mean_loss, message_of, repaired, statistics_of  # noqa: E402
from torch import distributed  # noqa: E402

from lightning_moe.calibration.processes import Processes  # noqa: E402


def main(folder, rank, size):
    store = distributed.FileStore(str(folder / "store"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    processes = Processes.of_default_group()
    assert (processes.rank, processes.size) == (rank, size)
    found = {name: statistics_of(name, processes=processes) for name in CALIBRATIONS}
    repair = repaired(processes=processes)
    errors = {name: message_of(name, processes=processes) for name in ("nan", "empty", "padding")}
    gradient = mean_loss(labels_of(rank))
    results = {"statistics": found, "repair": repair, "errors": errors, "gradient": gradient}
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
