"""Folders among the hyper-parameters of a module: a checkpoint is loaded from other working directories too."""

import os
from pathlib import Path

from lightning import LightningModule


def check_folder(source: str) -> None:
    """Runs as a module is made, also by `load_from_checkpoint`: an absolute folder is there.

    Raises:
        ValueError: there is no such folder.
    """
    if Path(source).is_absolute() and not Path(source).exists():
        raise ValueError(
            f"There is no model at '{source}'. If a checkpoint names it and the folder was moved, say where it is now: "
            "`load_from_checkpoint(path, source=...)`."
        )


def name_folders(module: LightningModule, *names: str) -> None:
    """Folders that are there become absolute paths in the saved hyper-parameters; assets and hub names stay."""
    for name in names:
        folder = module.hparams[name]
        if folder is not None and Path(folder).expanduser().is_dir():
            module.hparams[name] = os.path.abspath(Path(folder).expanduser())
