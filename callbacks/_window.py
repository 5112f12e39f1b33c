"""The batches that training saw last."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_moe.calibration.processes import OwnShare, Processes


class Window(deque[dict[str, Tensor]], OwnShare):
    """Ids and masks of the last batches that this process trained on: its share of what is calibrated on."""

    def remember(self, batch: Mapping[str, Tensor]) -> None:
        """Keeps int32 on the batch's device, so that nobody waits for a copy; of too many the oldest goes."""
        names = [name for name in ("input_ids", "attention_mask") if name in batch]
        self.append({name: batch[name].to(torch.int32) for name in names})

    def gather(self, processes: Processes) -> list[list[dict[str, Tensor]]]:
        """The windows of all processes, on the CPU; all call it together."""
        return processes.gather([{name: value.cpu() for name, value in batch.items()} for batch in self])

    def restore(self, windows: list[list[dict[str, Tensor]]], *, processes: Processes) -> None:
        """Each process gets its own window back; with another number of processes the batches are dealt out anew."""
        if len(windows) == processes.size:
            self.extend(windows[processes.rank])
        else:
            self.extend(processes.share([batch for window in windows for batch in window]))


def check_rememberable(batch: Any) -> None:
    """Refuses a training batch that a window cannot keep.

    Raises:
        ValueError: it is no dict with `input_ids`.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(
            f"`window` needs training batches that are dicts with `input_ids`, got {type(batch).__name__}. Calibrate "
            "on `data.calibration`, or let the training data give dicts."
        )
