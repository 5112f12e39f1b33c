"""Progress bars only where somebody watches: in a log file every update would be a line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
