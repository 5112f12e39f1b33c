"""Prunes and kills itself on the way (started by `test_prune_resumed.py`): STOCK FOLDER REPAIR POINT...

Each point is a child of its own; prints the signal that ended each.
"""

import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from streamed_pruning import prune_streamed  # noqa: E402

from lightning_moe.calibration.gram_sums import GramObserver  # noqa: E402
from lightning_moe.export import partial, shards  # noqa: E402
from lightning_moe.records import PrunePlan  # noqa: E402

# Where -> what is called, and the number of the call that does not return.
POINTS = {
    "first_shard": (shards, "save_file", 0),
    "third_shard": (shards, "save_file", 2),
    "last_shard": (shards, "save_file", 3),
    "gram": (GramObserver, "end_layer", 6),
    "configs": (partial, "write_manifest", 0),
    "named": (partial.Workspace, "remove", 0),  # the folder has its name, the working folder is still there
}


def kill_at(point):
    owner, name, number = POINTS[point]
    real, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == number + 1:
            if name == "save_file":  # half a file lies there
                Path(args[1]).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def main(stock, folder, repair, *points):
    for point in points:
        child = os.fork()
        if child == 0:
            kill_at(point)
            plan = PrunePlan.load(Path(folder) / "plan.json")
            prune_streamed(stock, Path(folder) / point, plan=plan, quantize=True, repair=bool(int(repair)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status))


if __name__ == "__main__":
    main(*sys.argv[1:])
