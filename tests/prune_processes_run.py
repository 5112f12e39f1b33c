"""Pruning shared by several processes (started by `test_prune_processes.py`): FOLDER RANK SIZE."""

import sys
from datetime import timedelta
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
from streamed_pruning import prune_streamed  # noqa: E402
from torch import distributed  # noqa: E402

from lightning_moe.calibration.processes import Processes  # noqa: E402
from lightning_moe.export.shards import ShardedWriter  # noqa: E402
from lightning_moe.records import PrunePlan  # noqa: E402


def main(folder, rank, size):
    store = distributed.FileStore(str(folder / "store"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    written, real = [], ShardedWriter.write

    def counted(self, index, tensors):
        written.append((self.folder.parent.name.removesuffix(".partial"), index))
        real(self, index, tensors)

    ShardedWriter.write = counted
    options = {"plan": PrunePlan.load(folder / "plan.json"), "processes": Processes.of_default_group()}
    prune_streamed(str(folder / "stock"), folder / "cut", quantize=True, **options)
    prune_streamed(str(folder / "stock"), folder / "repaired", quantize=False, repair=True, **options)
    message = ""
    try:
        prune_streamed(str(folder / "damaged"), folder / "refused", quantize=True, **options)
    except ValueError as error:
        message = str(error)
    torch.save({"written": written, "message": message}, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
