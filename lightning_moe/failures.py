"""What the machine does to a run, told in one line: memory that is not there, processes that were ended."""

import re
from collections.abc import Iterator

import torch

_MEMORY = re.compile(r"can't allocate memory|cannot allocate memory|not enough memory|std::bad_alloc", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:exited unexpectedly|is killed by signal)")
_PEER = re.compile(r"Connection (?:closed|reset) by peer|Connection closed by|Broken pipe|Socket Timeout|NCCL .*abort")
# Libraries that find no memory say so in their own ways: a file that cannot be mapped, a module that cannot be loaded.
_KINDS = (RuntimeError, OSError, ValueError, ImportError)
_LEAST_BYTES = 64 * 2**20  # with less than this no command gets anywhere
_NO_MEMORY = "not enough memory{}. Take smaller batches or shorter sequences, or end what else runs there."
_UNTOLD = re.compile("without exception set|without setting an exception")
_FORK = re.compile(r"can't start new thread|Resource temporarily unavailable")


def failure_of_machine(error: BaseException) -> str | None:
    """One line for the user where the machine, not the input, stopped the run; None of any other error.

    Args:
        error: what was raised; what it was raised for counts too, since libraries take lack of memory for bad input.

    Examples:
        >>> failure_of_machine(RuntimeError("you tried to allocate 3000000000 bytes: can't allocate memory"))
        'not enough memory for 3 GB more. Take smaller batches or shorter sequences, or end what else runs there.'
        >>> failure_of_machine(ValueError("`align` must be 1 or more, got 0."))
    """
    told = next((line for line in map(_told, _causes(error)) if line is not None), None)
    return _NO_MEMORY.format("") if told is None and _is_memory_short() else told


def _is_memory_short() -> bool:
    """A parser that could not look into a class blames its input, and tells nobody of the MemoryError."""
    try:
        bytearray(_LEAST_BYTES)
    except MemoryError:
        return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _told(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU is out of memory: {_first_sentence(text)} Take smaller batches or shorter sequences."
    if isinstance(error, MemoryError) or (isinstance(error, _KINDS) and _MEMORY.search(text)):
        size = re.search(r"allocate (\d+) bytes", text)
        wanted = f" for {int(size[1]) / 1e9:.3g} GB more" if size else ""
        return _NO_MEMORY.format(wanted)
    if isinstance(error, SystemError) and _UNTOLD.search(text):
        return (
            "a library failed without saying why, as some do where no memory is left. Take smaller batches or shorter "
            "sequences, or end what else runs there."
        )
    if not isinstance(error, RuntimeError):
        return None
    worker = _WORKER.search(text)
    if worker is not None:
        return (
            f"a process that loads data (pid {worker[1]}) was ended from outside, for lack of memory perhaps. Set "
            "`data.num_workers` to 0, or run the same command again."
        )
    if _PEER.search(text):
        return (
            "the connection to another process of the run broke: it ended. Its own last lines say why; without any, "
            "the system may have ended it for lack of memory."
        )
    if _FORK.search(text):
        return (
            f"the system gives no more processes or threads: {_first_sentence(text)} Too little memory is left, or "
            "their number is limited (`ulimit -u`)."
        )
    return None


def _first_sentence(text: str) -> str:
    return f"{text.split('. ')[0].strip().rstrip('.')}."
