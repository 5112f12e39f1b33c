"""Where a calibration may be interrupted; run as a script (MODEL FOLDER) it is killed at each of these places."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch
from tiny_models import random_tokens

from lightning_moe.calibration import hidden_states, streamed
from lightning_moe.calibration.collector import CalibrationCollector
from lightning_moe.calibration.layer_walk import LayerWalk
from lightning_moe.calibration.streamed import collect_streamed
from lightning_moe.models.streaming import StockFolder
from lightning_moe.records import CalibrationStatistics

# Name -> what is interrupted, at which call of it, before or after it; and the decoder layers that are done by then.
# The model has a dense layer and two MoE layers, the text three batches.
POINTS: dict[str, tuple[Any, str, int, bool, int]] = {
    "first_inputs": (hidden_states, "_write", 2, False, 0),
    "dense_layer": (hidden_states, "_write", 9, True, 0),
    "middle_of_a_layer": (CalibrationCollector, "end_layer", 2, False, 1),
    "middle_of_a_file": (hidden_states, "_write", 16, True, 1),
    "outputs_renamed": (streamed, "_save", 2, False, 1),
    "sums_saved": (streamed, "_save", 2, True, 2),
    "inputs_removed": (LayerWalk, "_remove_inputs", 3, True, 2),
    "last_layer": (CalibrationCollector, "end_layer", 5, False, 2),
    "all_saved": (streamed, "_save", 3, True, 3),
}


def loaders() -> dict[str, list[dict[str, torch.Tensor]]]:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    first = {"input_ids": random_tokens(length=12), "attention_mask": mask}
    return {"a": [first, {"input_ids": random_tokens(batch=3, seed=1)}], "b": [{"input_ids": random_tokens(seed=2)}]}


def calibrated(source: str, workspace: Path, **options: Any) -> CalibrationStatistics:
    return collect_streamed(StockFolder(source), loaders=loaders(), workspace=workspace, progress=False, **options)


@contextmanager
def interrupted(point: str, action: Callable[[], None]) -> Iterator[None]:
    """Calls `action` at a point."""
    owner, name, wanted, after, _ = POINTS[point]
    original, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == wanted and not after:
            action()
        result = original(*args, **kwargs)
        if len(calls) == wanted and after:
            action()
        return result

    with patch.object(owner, name, counted):
        yield


def main(source: str, folder: Path) -> None:
    for point in POINTS:
        child = os.fork()
        if child == 0:
            with interrupted(point, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                calibrated(source, folder / point)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, point


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
