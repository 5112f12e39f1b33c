"""Memory that libraries keep for later, back to the system."""

import ctypes
import os
import platform
from functools import cache
from typing import Any

# Measured: pages of libraries that were used for the first time, and what compiled kernels and heaps that hold a few
# small blocks keep once a model has run.
LIBRARY_BYTES, KERNEL_BYTES = 180_000_000, 220_000_000
# Measured over 7 and 18 layers of Qwen3-30B-A3B's shape: what the heap keeps of every layer that went through.
HEAP_SHARE = 0.01
# Read by oneDNN at its first product in this process.
_NUM_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def keep_few_kernels() -> None:
    """Has oneDNN keep 64 compiled kernels, not 1,024: it compiles one for each number of tokens that an expert gets.

    All of them take 0.5 GB, and compiling one takes 0.3 ms. What the environment says counts more.
    """
    os.environ.setdefault(_NUM_KERNELS, "64")


def give_back_freed() -> None:
    """Glibc keeps what was freed between blocks still in use, most of a layer's temporaries: 20 ms to give it back.

    Nothing elsewhere: other allocators do so by themselves.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    return ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None
