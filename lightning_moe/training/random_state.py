"""The states of the random number generators as plain types and tensors, for checkpoints."""

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader


def random_state(generators: Iterable[torch.Generator] = ()) -> dict[str, Any]:
    """The states of torch, of every CUDA device, of NumPy's global generator, of Python's, and of `generators`."""
    kind, words, *rest = np.random.get_state(legacy=True)
    version, numbers, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, np.asarray(words).tolist(), *rest],
        "python": [version, list(numbers), next_gauss],
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: Mapping[str, Any], generators: Iterable[torch.Generator] = ()) -> None:
    """Sets what `random_state` gave; states of devices and generators that are not there are left out."""
    torch.set_rng_state(state["torch"])
    for device, device_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(device_state, device)
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))
    version, numbers, next_gauss = state["python"]
    random.setstate((version, tuple(numbers), next_gauss))
    for generator, own_state in zip(generators, state["generators"], strict=False):
        generator.set_state(own_state)


def own_generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The generators that a loader and its samplers hold, each once, in a fixed order; not torch's global one."""
    batch_sampler = loader.batch_sampler
    sampled = () if batch_sampler is None else (batch_sampler, *_samplers_in(batch_sampler))
    found = [value for held in (loader, loader.sampler, *sampled) for value in vars(held).values()]
    return list({id(value): value for value in found if isinstance(value, torch.Generator)}.values())


def _samplers_in(sampler: Any) -> list[Any]:
    """What a batch sampler draws from."""
    return [value for value in vars(sampler).values() if isinstance(value, torch.utils.data.Sampler)]
