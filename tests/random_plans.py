"""Random pruning plans for tests: ragged widths, some experts evicted."""

from collections.abc import Sequence

import torch
from tiny_models import NUM_EXPERTS, WIDTH
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.models.discovery import model_shape
from lightning_moe.records import PrunePlan


def random_plan(model: PreTrainedModel, *, evicted: Sequence[Sequence[int]] = (), seed: int = 0) -> PrunePlan:
    """Keeps a random share of each expert's channels (at least one); `evicted` names the experts to drop, per layer."""
    generator = torch.Generator().manual_seed(seed)
    shape = model_shape(model)
    keep = []
    for index, layer in enumerate(shape.layers):
        gone = set(evicted[index]) if index < len(evicted) else set()
        parts = []
        for expert, width in enumerate(layer.widths):
            kept = torch.rand(width, generator=generator) < torch.rand((), generator=generator)
            kept[:1] = True
            parts.append(torch.zeros(width, dtype=torch.bool) if expert in gone else kept)
        keep.append(torch.cat(parts))
    return PrunePlan(shape=shape, method="random", prune_ratio=0.5, align=1, keep=tuple(keep), provenance={})


def uniform_plan(model: PreTrainedModel, *, width: int, evicted: Sequence[Sequence[int]] = ()) -> PrunePlan:
    """Keeps `width` random channels of every expert."""
    shape = model_shape(model)
    generator = torch.Generator().manual_seed(0)
    keep = []
    for index, layer in enumerate(shape.layers):
        gone = set(evicted[index]) if index < len(evicted) else set()
        ranks = [torch.randperm(stock, generator=generator) for stock in layer.widths]
        keep.append(torch.cat([(rank < width) & (expert not in gone) for expert, rank in enumerate(ranks)]))
    return PrunePlan(shape=shape, method="random", prune_ratio=0.5, align=1, keep=tuple(keep), provenance={})


def alike_plan(model: PreTrainedModel, *, keep_C: Tensor) -> PrunePlan:
    """The same channels stay in every layer."""
    shape = model_shape(model)
    keep = (keep_C,) * len(shape.layers)
    return PrunePlan(shape=shape, method="test", prune_ratio=0.5, align=1, keep=keep, provenance={})


def mixed_keep() -> Tensor:
    """Expert 0 stays whole, expert 1 goes, the others keep a random half."""
    keep_EI = torch.rand(NUM_EXPERTS, WIDTH, generator=torch.Generator().manual_seed(3)) < 0.5
    keep_EI[0], keep_EI[1] = True, False
    return keep_EI.reshape(-1)
