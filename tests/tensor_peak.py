"""The most bytes of tensors that a piece of code holds at once, by watching every operation."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.held, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensors, new in (((args, kwargs), False), (output, True)):
            for tensor in tree_leaves(tensors):
                if isinstance(tensor, torch.Tensor):
                    self._see(tensor.untyped_storage(), new=new)
        self.peak = max(self.peak, self.held)
        return output

    def _see(self, storage, *, new):
        key, size = storage._cdata, storage.nbytes() if new else 0
        if key in self.known:
            return

        def gone(_):
            self.held -= size
            self.known.pop(key, None)

        self.held += size
        self.known[key] = weakref.ref(storage, gone)


def tensor_peak(function: Callable[[], object]) -> int:
    """Bytes beyond those that were there before the call."""
    with _Watch() as watch:
        function()
    return watch.peak
