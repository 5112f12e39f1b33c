"""The command line: LightningCLI for `fit` and `validate`, thin commands for the stages around them."""

import logging
import os
import re
import signal
import sys
import warnings
from difflib import get_close_matches
from importlib.metadata import version
from inspect import getdoc
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import ArgumentError
from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]: its stub lacks the name
from typing_extensions import override

import callbacks
from lightning_moe import __version__
from lightning_moe.commands import COMMANDS
from lightning_moe.commands._parsers import PROGRAM, CommandParser, TrainingParser, fitted, in_words, usage
from lightning_moe.commands._yaml import check_config_files, checked_configs
from lightning_moe.failures import failure_of_machine
from lightning_moe.signals import SIGNAL_CODE, Terminated, forget_children, signals_raise
from lightning_moe.training.checkpoint_files import checkpoint_errors, named_class, read_checkpoint
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.module import LanguageModelModule, RecoveryModule

TRACEBACK_VARIABLE = "LIGHTNING_MOE_TRACEBACK"
# Beginnings of lines in which jsonargparse lists what else it tried and what came, whole.
_PARSER_CHATTER = (
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value type:",
    "Given value: Namespace(",
)
_ORDER = ("calibrate", "plan", "prune", "teach", "fit", "validate", "evaluate", "compare", "export", "report")
_AGAIN = "the same command goes on where it stopped"
_GOES_ON = dict.fromkeys(("calibrate", "prune", "teach"), _AGAIN) | {
    "fit": "with a checkpoint (ModelCheckpoint), `--ckpt_path last` goes on from it"
}
_LIBRARIES = (RuntimeError, MemoryError, SystemError, ImportError)
_EXPECTED = (ArgumentError, ValueError, OSError, MisconfigurationException, *_LIBRARIES)
_GIVEN_FLAG = re.compile(r"Given value: NestedArg\(key='.*', val='?(.*?)'?\)")
# What torch puts before the message of an error in a worker: a traceback, to its last unindented line.
_WORKER_TRACEBACK = re.compile(r"^Caught \w+ in DataLoader worker process \d+\..*\n[\w.]+: ", re.DOTALL)
_TRAINING = {
    "fit": "Train: calibrate, prune, pack, recover, report and export, as the callbacks say.",
    "validate": "Loss and perplexity per validation corpus, through the Trainer.",
}


# Argument group -> class in `callbacks`, in the order in which they act.
CALLBACK_GROUPS = {
    "calibration": "ExpertCalibration",
    "pruning": "ChannelPruning",
    "expert_pruning": "ExpertPruning",
    "recovery": "Recovery",
    "monitor": "RouterMonitor",
    "export": "ExportPruned",
    "report": "CompressionReport",
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
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = TrainingParser(**{"dump_header": [f"lightning_moe=={__version__}"]} | kwargs)
        parser.add_argument(
            "-c", "--config", action="config", help="YAML file with arguments; may be given several times."
        )
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Each callback of ours is an optional argument group, so that one value can be overridden by flag."""
        for group, name in CALLBACK_GROUPS.items():
            callback: type[Callback] = vars(callbacks)[name]
            parser.add_lightning_class_args(callback, group, subclass_mode=True, required=False)

    @override
    def _parse_ckpt_path(self) -> None:
        """Lightning takes the module's class and settings from the file before anything else has looked at it."""
        options = self.config[self.config["subcommand"]]
        path, model = options["ckpt_path"], options["model"]
        if path is None or not Path(path).is_file() or options["weights_only"] is False:
            return
        saved = named_class(read_checkpoint(path))
        own = [f"{module.__module__}.{module.__qualname__}" for module in (LanguageModelModule, RecoveryModule)]
        if saved not in (None, model["class_path"], *own):
            raise ValueError(
                f"The checkpoint '{path}' names the class {saved!r:.100}, and `model` is '{model['class_path']}'. A "
                "checkpoint does not choose the code that runs: if you know the class, name it with `--model`."
            )
        with checkpoint_errors(path):
            super()._parse_ckpt_path()

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
    if not arguments or arguments[0] in ("-h", "--help", "--version"):
        sys.stdout.write(versions() if "--version" in arguments else overview())
        return
    name = arguments[0]
    if name not in _ORDER:
        _stop(_unknown(name), code=2)
    try:
        with signals_raise(), checked_configs(classes=name in _TRAINING):
            check_config_files(arguments[1:], classes=name in _TRAINING)
            if name in COMMANDS:
                run_command(name, arguments[1:])
            else:
                train(arguments)
    except (KeyboardInterrupt, Terminated, SystemExit, *_EXPECTED) as error:
        forget_children()
        told = _told(error, name=name)
        if told is None or os.environ.get(TRACEBACK_VARIABLE):
            raise
        message, code = told
        _stop(f"{name}: {message}", code=code)


def _told(error: BaseException, *, name: str) -> tuple[str, int] | None:
    """The line and the exit code for what ended a command; None of an error of the program itself."""
    goes_on = f"; {_GOES_ON[name]}" if name in _GOES_ON else ""
    # Lightning answers Ctrl-C with an exit of its own, without a word.
    asked = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(asked, KeyboardInterrupt):
        return f"interrupted{goes_on}.", SIGNAL_CODE + signal.SIGINT
    if isinstance(error, Terminated):
        return f"terminated{goes_on}.", SIGNAL_CODE + signal.SIGTERM
    machine = failure_of_machine(error)
    if machine is not None:
        return machine, 1
    if isinstance(error, ArgumentError):
        return f"{one_line(error).rstrip('.')}. `{PROGRAM} {name} --help` lists the options.", 2
    if isinstance(error, ValueError | OSError | MisconfigurationException | LinAlgError):
        return one_line(error), 1
    return None  # another RuntimeError, SystemError or ImportError, or the parser's own exit


def run_command(name: str, arguments: list[str]) -> None:
    """Parses the arguments (and `--config` files) of one of `COMMANDS` and runs it.

    Raises:
        ArgumentError: the command line or a file is refused.
        ValueError: the command refuses its input.
    """
    parser = command_parser(name)
    options = parser.instantiate_classes(parser.parse_args(arguments))
    options.pop("config", None)
    COMMANDS[name](**options)


def train(arguments: list[str]) -> CompressionCLI:
    """`fit` and `validate`, through LightningCLI.

    Raises:
        ArgumentError: the command line or a file is refused.
        ValueError: a module, a callback or the data refuse their input.
    """
    return CompressionCLI(
        LanguageModelModule,
        TextDataModule,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_kwargs={"prog": PROGRAM, "exit_on_error": False}
        | {
            name: {"exit_on_error": False, "usage": usage(name), "description": summary}
            for name, summary in _TRAINING.items()
        },
        args=arguments,
    )


def one_line(error: BaseException) -> str:
    """What went wrong, without the parser's account of every type it tried."""
    text = _WORKER_TRACEBACK.sub("In a worker process of a data loader: ", str(error))
    told = [_GIVEN_FLAG.sub(r"Got \1.", line.strip().removeprefix("- ")) for line in text.splitlines()]
    useful = [in_words(line) for line in told if line and not line.startswith(_PARSER_CHATTER)]
    return " ".join(dict.fromkeys(useful)) or type(error).__name__


def _stop(message: str, *, code: int) -> NoReturn:
    sys.stderr.write(f"{PROGRAM}: {message}\n")
    sys.exit(code)


def _unknown(name: str) -> str:
    if name.startswith("-"):
        return f"the subcommand comes first and its options after it, got '{name}'. It is one of {', '.join(_ORDER)}."
    near = [f"Did you mean `{one}`? " for one in get_close_matches(name, _ORDER, n=1)]
    return f"unknown subcommand '{name}'. {''.join(near)}`{PROGRAM} --help` lists them."


def command_parser(name: str) -> CommandParser:
    """The parser of one command; `data` is TextDataModule's own argument group, as it is for `fit`."""
    command = COMMANDS[name]
    parser = CommandParser(usage=usage(name), description=_summary(name), exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with arguments; may be given several times.")
    needs_data = "data" in command.__annotations__
    parser.add_function_arguments(command, as_group=False, skip={"data"} if needs_data else set())
    if needs_data:
        parser.add_class_arguments(TextDataModule, "data")
    return parser


def overview() -> str:
    """All subcommands, one line each where the terminal is wide enough."""
    summaries = {name: _summary(name) for name in COMMANDS} | _TRAINING
    lines = [
        f"usage: {usage('SUBCOMMAND')}",
        "",
        *(fitted(f"  {name:<10} {summaries[name]}", indent=13) for name in _ORDER),
        "",
        fitted(f"`{PROGRAM} SUBCOMMAND --help` lists the options, `{PROGRAM} --version` the versions."),
        fitted(f"Errors are one line; with {TRACEBACK_VARIABLE}=1 in the environment they say where they came from."),
        "",
    ]
    return "\n".join(lines)


def versions() -> str:
    """Ours, and those of the libraries that a report of an error wants."""
    python = ".".join(map(str, sys.version_info[:3]))
    told = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "bitsandbytes", "lightning"))
    return f"lightning_moe {__version__} (Python {python}, torch {torch.__version__}, {told})\n"


def _summary(name: str) -> str:
    """First line of a command's docstring."""
    return (getdoc(COMMANDS[name]) or "").splitlines()[0]


def _configure_output() -> None:
    """Log lines of ours on stdout; libraries' chatter and known harmless warnings off."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    for package in ("lightning_moe", "callbacks"):
        logging.getLogger(package).setLevel(logging.INFO)
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*treespec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    # The arguments are those of the process, handed on.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")


def _check_callbacks_package() -> None:
    """`callbacks` is a common name: make sure that ours was imported.

    Raises:
        SystemExit: another package of that name shadows ours.
    """
    if not set(CALLBACK_GROUPS.values()) <= set(vars(callbacks)):
        found = vars(callbacks).get("__file__") or "without a file"
        sys.exit(
            f"Another package called `callbacks` ({found}) shadows ours: change the working directory or PYTHONPATH."
        )
