"""Held-out loss per corpus, and which experts the text really used.

B sequences, S positions, V vocabulary, T tokens, K experts per token, E experts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.text import Perplexity
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lightning_moe.calibration.observer import evaluating
from lightning_moe.models.discovery import MoeLayer, expert_widths, moe_layers
from lightning_moe.progress import hidden

_ALONE: dict[str, Any] = {"sync_on_compute": False}


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Result of one pass over held-out text.

    Args:
        nll_per_corpus: mean next-token loss of each corpus, in nats.
        num_tokens: predicted tokens of all corpora.
        usage: name of each experts module -> share of tokens (padding left out) routed to each expert `[E]`, summing
            to top-k.
    """

    nll_per_corpus: Mapping[str, float]
    num_tokens: int
    usage: Mapping[str, Tensor]

    @property
    def nll(self) -> float:
        """Mean over corpora, each with the same weight."""
        return sum(self.nll_per_corpus.values()) / len(self.nll_per_corpus)


def update_perplexity(metric: Perplexity, logits_BSV: Tensor, labels_BS: Tensor) -> None:
    """Adds a batch: position s predicts the label of position s + 1; label -100 does not count."""
    metric.update(logits_BSV[:, :-1].float(), labels_BS[:, 1:])


@torch.no_grad()
def evaluate_model(
    model: PreTrainedModel, *, loaders: Mapping[str, Iterable[Mapping[str, Tensor]]], progress: bool = True
) -> Evaluation:
    """Evaluates a model on one loader per corpus; batches hold `input_ids`, `attention_mask`, `labels`, `[B, S]`.

    Raises:
        ValueError: no corpora, a corpus without a predicted token, or a loss that is not finite.
    """
    if not loaders:
        raise ValueError("There is no corpus to evaluate on: give the data module at least one validation corpus.")
    device = next(model.parameters()).device
    nll: dict[str, float] = {}
    num_tokens = 0
    usage = _Usage(model)
    with evaluating(model), usage.counting():
        for name, loader in loaders.items():
            # Of this process alone: the report of a distributed run is made by its first rank.
            metric = Perplexity(ignore_index=-100, **_ALONE).to(device)
            for batch in tqdm(loader, desc=f"evaluate {name}", leave=False, disable=hidden(progress=progress)):
                inputs = {key: value.to(device) for key, value in batch.items()}
                labels_BS = inputs.pop("labels")
                usage.counted_T = inputs["attention_mask"].reshape(-1) != 0
                update_perplexity(metric, model(**inputs, use_cache=False).logits, labels_BS)
                num_tokens += int((labels_BS[:, 1:] != -100).sum())
            nll[name] = _finite_nll(metric, corpus=name)
    return Evaluation(nll_per_corpus=nll, num_tokens=num_tokens, usage=usage.shares())


def _finite_nll(metric: Perplexity, *, corpus: str) -> float:
    if int(metric.count) == 0:
        raise ValueError(f"Corpus '{corpus}' has no token to predict: it is empty or shorter than two tokens.")
    nll = float(metric.compute().log())
    if not math.isfinite(nll):
        raise ValueError(f"The loss on corpus '{corpus}' is {nll}: the model's weights or its text are broken.")
    return nll


class _Usage:
    """Counts the tokens routed to each expert; `counted_T` says which tokens of the running batch are no padding."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = moe_layers(model)
        self.counted_T = torch.empty(0, dtype=torch.bool)
        self.num_tokens: dict[str, int] = {}
        self.counts: dict[str, Tensor] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Watches every experts module while the block runs."""
        hooks = [layer.experts.register_forward_pre_hook(self._hook(layer)) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def shares(self) -> dict[str, Tensor]:
        """Name of each experts module -> share of tokens per expert `[E]`."""
        return {name: (count_E / self.num_tokens[name]).cpu() for name, count_E in self.counts.items()}

    def _hook(self, layer: MoeLayer) -> Callable[..., None]:
        num_experts = len(expert_widths(layer.base_experts))

        def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            index_TK = args[1][self.counted_T]
            count_E = torch.bincount(index_TK.reshape(-1), minlength=num_experts)
            self.counts[layer.name] = self.counts.get(layer.name, 0) + count_E
            self.num_tokens[layer.name] = self.num_tokens.get(layer.name, 0) + len(index_TK)

        return count
