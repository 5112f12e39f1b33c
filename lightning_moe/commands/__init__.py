"""The stages as commands: each reads the files the stage before wrote, and can be run alone."""

from lightning_moe.commands.calibration import calibrate
from lightning_moe.commands.comparison import compare
from lightning_moe.commands.evaluation import evaluate
from lightning_moe.commands.exporting import export
from lightning_moe.commands.planning import plan
from lightning_moe.commands.pruning import prune
from lightning_moe.commands.reporting import report
from lightning_moe.commands.teaching import teach

_ALL = (calibrate, plan, prune, teach, evaluate, compare, export, report)
COMMANDS = {command.__name__: command for command in _ALL}

__all__ = ["COMMANDS", "calibrate", "compare", "evaluate", "export", "plan", "prune", "report", "teach"]
