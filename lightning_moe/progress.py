"""Progress bars only where somebody watches: in a log file every update would be a line."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging


def hidden(*, progress: bool) -> bool | None:
    """What tqdm's `disable` takes: True hides the bar, None hides it unless standard error is a terminal."""
    return None if progress else True


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers' own bars ("Loading weights") are off inside the block unless standard error is a terminal."""
    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the bars of `datasets`, one for each conversion of a moment."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Only warnings of these loggers inside the block: where many models are cut, a table for each tells nothing."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
