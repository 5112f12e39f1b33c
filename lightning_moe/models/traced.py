"""The experts of a layer as one operator, so that `torch.compile` makes one graph of a whole model.

T tokens, H hidden, K experts per token.

How many tokens an expert gets is data, which a graph cannot hold. An operator whose inside is never traced can: it
looks up the module that the graph was traced for and runs it. What is in that module, packed or not, cut again or
trained since, is read then, so nothing of it is frozen into the graph. For inference only: under autograd the graph
breaks around the experts instead.
"""

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class RoutedExperts(Protocol):
    """A module of experts that runs inside a graph."""

    def routed_output(self, input_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """`[T, H], [T, K], [T, K] -> [T, H]` of type `dtype`, contiguous and new."""
        ...


_numbers = count()
_modules: WeakValueDictionary[int, RoutedExperts] = WeakValueDictionary()


def new_ticket(module: RoutedExperts) -> Tensor:
    """What finds the module again inside a graph: an int64 scalar on the CPU.

    A tensor and not a number: graphs take it as an input, so that layers of one kind share one graph.
    """
    number = next(_numbers)
    _modules[number] = module
    return torch.tensor(number, device="cpu")


# No CUDA graph may record it: it waits for the offsets of the routed pairs.
@torch.library.custom_op("lightning_moe::routed_output", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def traced_output(input_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype, ticket: Tensor) -> Tensor:
    """`routed_output` of the module that the ticket is of: `[T, H] -> [T, H]` of type `dtype`."""
    with torch.no_grad():
        return _modules[int(ticket)].routed_output(input_TH, index_TK, weights_TK, dtype)


@traced_output.register_fake
def _(input_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype, ticket: Tensor) -> Tensor:
    return input_TH.new_empty(input_TH.shape, dtype=dtype)


def traces_for_inference() -> bool:
    """Whether `torch.compile` traces this call, and without autograd.

    Raises:
        ValueError: another tracer does, whose program would run without the module or with the routing of one text.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError(
            "`torch.export` and `torch.jit.trace` cannot hold experts of unequal width, whose sizes depend on the "
            "routing. Export it as `padded`, which loads as a stock model, and trace that; or use `torch.compile`."
        )
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()
