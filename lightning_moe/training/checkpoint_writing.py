"""A checkpoint takes its name when it is whole, on whatever disk it lies: what was there before stays until then."""

from typing import Any

import torch
from fsspec.core import url_to_fs
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from lightning_moe.files import write_atomically


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's own, which writes to the system's temporary folder and moves the file from there.

    Between two disks such a move is a copy: a kill or a full disk in it leaves half a file, and takes the checkpoint
    that had the name. This one writes beside the final name, and renames.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint; one that is not on a disk of this machine is Lightning's business.

        Raises:
            ValueError: the disk does not take it.
        """
        system, local = url_to_fs(str(path))
        if storage_options is not None or "file" not in system.protocol:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with write_atomically(local) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # The archive's end cannot be written either, and PyTorch says so in place of why.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise ValueError(
                f"The checkpoint '{path}' cannot be written: {cause.strerror}. What had that name is as it was. Make "
                "room there, and go on from the last checkpoint (`ckpt_path`)."
            ) from error


def write_whole_checkpoints(trainer: Trainer) -> None:
    """In place of Lightning's own way; another plugin that the user has chosen stays."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()
