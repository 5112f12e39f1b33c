"""Norms of adapted weights, kept until a weight may have changed.  E experts, C channels, H hidden."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0


def _count_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def weights_key(tensors: Mapping[str, Tensor]) -> object:
    """What changes whenever trained tensors may have changed; to be compared.

    Their `versions`, and the number of optimizer steps of this process, because bitsandbytes' 8-bit optimizers write
    through raw pointers and leave no trace in a tensor.
    """
    return _optimizer_steps, versions(tensors)


def versions(tensors: Mapping[str, Tensor]) -> object:
    """What changes when tensors are changed in place, replaced, cast or moved, also by `.data =`; to be compared.

    Memory is told apart by weak references: an address, or the id of a tensor, may be given out again. FSDP2 frees and
    fills the memory of one storage layer by layer, at changing addresses; that is no change. Nor does it show a change
    of what it fills it with, which optimizer steps and `train()` bring about (`weights_key`, `DoraExperts`).
    """
    return tuple(
        (name, StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset(), tensor.dtype, _version(tensor))
        for name, tensor in tensors.items()
    )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # an inference tensor has no version


class NormCache:
    """`||W + s B A||` of the outputs of each projection, filled expert by expert as they are met.

    The norm is constant in backward and changes only with A, B, s and W, so all micro-batches of an optimizer step, the
    recomputation under gradient checkpointing, and all tokens of a generation share it. Copies and pickles are empty.

    Attributes:
        key: what the norms belong to.
        norms: by projection `gate [C]`, `up [C]`, `down [E, H]`, in storage order; of known experts only.
        known: slots whose norms are filled.
    """

    key: object = None
    norms: Mapping[str, Tensor] = {}
    known: frozenset[int] = frozenset()

    def prepare(self, *, key: object, like: Mapping[str, Tensor]) -> None:
        """Forgets everything where `key` is another than last time; new norms have the shapes of `like`."""
        if key != self.key:
            # Ordinary tensors even where this is called under `inference_mode`: training may use them next.
            with torch.inference_mode(mode=False):
                self.norms = {side: torch.zeros(t.shape, dtype=t.dtype, device=t.device) for side, t in like.items()}
            self.key, self.known = key, frozenset()

    def knows(self, slots: range) -> bool:
        """Whether the norms of all these slots are filled."""
        return self.known.issuperset(slots)

    def learn(self, slots: range) -> None:
        """The norms of these slots have been filled."""
        self.known = self.known.union(slots)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class BaseNorms:
    """Squared norms of the frozen base's outputs, computed where the base has changed. Copies and pickles are empty.

    No buffers: a cast does not round them, and distributed training does not send them round.
    """

    key: object = None
    squares: Mapping[str, Tensor] = {}

    def refresh(self, *, key: object, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """By projection `gate [C]`, `up [C]`, `down [E, H]`, in storage order; computed where `key` is another."""
        if key != self.key:
            with torch.inference_mode(mode=False), torch.no_grad():
                self.squares = compute()
            self.key = key
        return self.squares

    def __getstate__(self) -> dict[str, Any]:
        return {}
