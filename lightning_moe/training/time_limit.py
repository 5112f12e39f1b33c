"""An end to work that was asked for by a file from elsewhere and may never come to one."""

import signal
import sys
import threading
from contextlib import AbstractContextManager
from types import FrameType

from typing_extensions import override

_AGAIN = 0.01  # seconds until the next attempt, where other code took the first for an error of its own


class CpuLimit(AbstractContextManager[None]):
    """Ends its block after so many seconds of this process's computing time; loops in C that heed Ctrl-C end, too.

    Signals are for the main thread alone, and where somebody else has set this one it stays theirs: elsewhere, and on
    Windows, the block is not limited.

    Args:
        seconds: how many.

    Raises:
        TimeoutError: in the block, when the time is over.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._armed = False

    @override
    def __enter__(self) -> None:
        if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL:
            self._armed = True
            signal.signal(signal.SIGVTALRM, self._end)
            signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds, _AGAIN)

    @override
    def __exit__(self, *_: object) -> None:
        if self._armed and sys.platform != "win32":
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, signal.SIG_DFL)

    def _end(self, _signal: int, frame: FrameType | None) -> None:
        interrupted = None if frame is None else frame.f_code
        if interrupted is not None and (interrupted.co_filename == __file__ or interrupted.co_name == "__del__"):
            return  # an error would be lost there, or leave the timer running: the next attempt is near
        raise TimeoutError(f"it has computed for {self.seconds:g} seconds, and no end is in sight")
