"""Recovery on several processes (see `recovery_runs.py`): FOLDER STRATEGY SIZE RESUMED_SIZE."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
from recovery_runs import recover  # noqa: E402

from callbacks import CompressionReport, ExportPruned  # noqa: E402


def main(folder, strategy, size, resumed_size):
    after = [ExportPruned(folder=str(folder / "exports")), CompressionReport(folder=str(folder / "rows"), name="run")]
    name, settings = f"{strategy}{size}", {"strategy": strategy, "size": size}
    found, trainer = recover(folder, name=name, callbacks=after, **settings)
    checkpoint = str(folder / f"{strategy}{resumed_size}" / "step=2.ckpt")
    resumed, _ = recover(folder, name=f"{name}_resumed", resume=checkpoint, **settings)
    seen = {"whole": found, "resumed": resumed}
    if strategy == "fsdp2" and size == resumed_size:
        shards = str(folder / "shards" / "step=2.ckpt")
        recover(folder, name="shards", in_shards=True, **settings)
        seen["from_shards"], _ = recover(folder, name="shards_resumed", in_shards=True, resume=shards, **settings)
    torch.save(seen, folder / f"{name}_rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
