"""The command line: LightningCLI for `fit` and `validate`, thin commands for the stages around them."""

import logging
import sys
import warnings
from inspect import getdoc
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser
from lightning import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import callbacks
from lightning_moe.commands import COMMANDS
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.module import LanguageModelModule

PROGRAM = "python -m lightning_moe"
_TRAINING = {
    "fit": "Train: calibrate, prune, pack, recover, report and export, as the callbacks say.",
    "validate": "Loss and perplexity per validation corpus, through the Trainer.",
}


# In the order in which they act.
CALLBACK_GROUPS: dict[str, type[Callback]] = {
    "calibration": callbacks.ExpertCalibration,
    "pruning": callbacks.ChannelPruning,
    "recovery": callbacks.Recovery,
    "export": callbacks.ExportPruned,
    "report": callbacks.CompressionReport,
}


class CompressionCLI(LightningCLI):
    """LightningCLI over our modules and TextDataModule."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Each callback of ours is an optional argument group, so that one value can be overridden by flag."""
        for group in CALLBACK_GROUPS:
            parser.add_lightning_class_args(CALLBACK_GROUPS[group], group, subclass_mode=True, required=False)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Leaves out the groups that were not given."""
        keys = self._parser(self.subcommand).callback_keys
        keys[:] = [key for key in keys if self._get(self.config_init, key) is not None]
        return super().instantiate_trainer(**kwargs)


def main(arguments: list[str] | None = None) -> None:
    """Runs one subcommand.

    Args:
        arguments: the command line without the program's name; the process's own if None.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _configure_output()
    _check_callbacks_package()
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(overview())
    elif arguments[0] in COMMANDS:
        run_command(arguments[0], arguments[1:])
    elif arguments[0] in _TRAINING:
        CompressionCLI(
            LanguageModelModule,
            TextDataModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            args=arguments,
        )
    else:
        sys.exit(f"Unknown subcommand '{arguments[0]}'.\n\n{overview()}")


def run_command(name: str, arguments: list[str]) -> None:
    """Parses the arguments (and `--config` files) of one of `COMMANDS` and runs it; bad input ends with one line."""
    parser = command_parser(name)
    options = parser.instantiate_classes(parser.parse_args(arguments))
    options.pop("config", None)
    try:
        COMMANDS[name](**options)
    except ValueError as error:
        sys.exit(f"{PROGRAM} {name}: {error}")


def command_parser(name: str) -> ArgumentParser:
    """The parser of one command; `data` is TextDataModule's own argument group, as it is for `fit`."""
    command = COMMANDS[name]
    parser = ArgumentParser(prog=f"{PROGRAM} {name}", description=_summary(name))
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with arguments; may be given several times."
    )
    needs_data = "data" in command.__annotations__
    parser.add_function_arguments(command, skip={"data"} if needs_data else set())
    if needs_data:
        parser.add_class_arguments(TextDataModule, "data")
    return parser


def overview() -> str:
    """All subcommands, one line each."""
    summaries = {name: _summary(name) for name in COMMANDS} | _TRAINING
    order = ("calibrate", "plan", "prune", "fit", "validate", "evaluate", "compare", "export", "report")
    lines = [f"  {name:<10} {summaries[name]}" for name in order]
    return "\n".join(
        [
            f"usage: {PROGRAM} SUBCOMMAND [--config FILE] [options]",
            "",
            *lines,
            "",
            f"`{PROGRAM} SUBCOMMAND --help` lists the options.",
            "",
        ]
    )


def _summary(name: str) -> str:
    """First line of a command's docstring."""
    return (getdoc(COMMANDS[name]) or "").splitlines()[0]


def _configure_output() -> None:
    """Log lines of ours on stdout; libraries' chatter and known harmless warnings off."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    for package in ("lightning_moe", "callbacks"):
        logging.getLogger(package).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=".*treespec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _check_callbacks_package() -> None:
    """`callbacks` is a common name: make sure that ours was imported.

    Raises:
        SystemExit: another package of that name shadows ours.
    """
    ours: Any = vars(callbacks).get("ExpertCalibration")
    if ours is None:
        found = Path(callbacks.__file__ or "a namespace package").parent
        sys.exit(
            f"Another package called `callbacks` ({found}) shadows ours: change the working directory or PYTHONPATH."
        )
