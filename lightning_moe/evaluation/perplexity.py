"""Held-out loss per corpus, and which experts the text really used.

B sequences, S positions, V vocabulary, T tokens, K experts per token, E experts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.text import Perplexity
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lightning_moe.calibration.observer import evaluating
from lightning_moe.evaluation.agreement import DenseReference
from lightning_moe.models.discovery import MoeLayer, expert_widths, moe_layers
from lightning_moe.models.families import is_moe
from lightning_moe.progress import hidden

_ALONE: dict[str, Any] = {"sync_on_compute": False}


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Result of one pass over held-out text.

    Args:
        nll_per_corpus: mean next-token loss of each corpus, in nats.
        num_tokens: predicted tokens of all corpora.
        usage: name of each experts module -> share of tokens (padding left out) routed to each expert `[E]`, summing
            to top-k; empty for a model without experts.
        kl_per_corpus: mean KL(dense || model) of the next token, in nats; empty without a reference.
        agreement_per_corpus: share of tokens for which the dense model's likeliest next token is this model's too.
    """

    nll_per_corpus: Mapping[str, float]
    num_tokens: int
    usage: Mapping[str, Tensor]
    kl_per_corpus: Mapping[str, float] = field(default_factory=dict)
    agreement_per_corpus: Mapping[str, float] = field(default_factory=dict)

    @property
    def nll(self) -> float:
        """Mean over corpora, each with the same weight."""
        return _mean(self.nll_per_corpus)

    @property
    def kl(self) -> float | None:
        """Mean over corpora; None without a reference."""
        return _mean(self.kl_per_corpus) if self.kl_per_corpus else None

    @property
    def agreement(self) -> float | None:
        """Mean over corpora; None without a reference."""
        return _mean(self.agreement_per_corpus) if self.agreement_per_corpus else None


def _mean(per_corpus: Mapping[str, float]) -> float:
    return sum(per_corpus.values()) / len(per_corpus)


def update_perplexity(metric: Perplexity, logits_BSV: Tensor, labels_BS: Tensor) -> None:
    """Adds a batch: position s predicts the label of position s + 1; label -100 does not count."""
    metric.update(logits_BSV[:, :-1].float(), labels_BS[:, 1:])


@torch.no_grad()
def evaluate_model(
    model: PreTrainedModel,
    *,
    loaders: Mapping[str, Iterable[Mapping[str, Tensor]]],
    reference: DenseReference | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluates a model on one loader per corpus; batches hold `input_ids`, `attention_mask`, `labels`, `[B, S]`.

    Raises:
        ValueError: no corpora, a corpus without a predicted token, a loss that is not finite, or a reference that was
            measured on other batches.
    """
    if not loaders:
        raise ValueError("There is no corpus to evaluate on: give the data module at least one validation corpus.")
    device = next(model.parameters()).device
    nll: dict[str, float] = {}
    compared: dict[str, tuple[float, float]] = {}
    num_tokens = 0
    usage = _Usage(model)
    with evaluating(model), usage.counting():
        for name, loader in loaders.items():
            # Of this process alone: the report of a distributed run is made by its first rank.
            metric = Perplexity(ignore_index=-100, **_ALONE).to(device)
            agreement = None if reference is None else reference.against(name)
            for batch in tqdm(loader, desc=f"evaluate {name}", leave=False, disable=hidden(progress=progress)):
                inputs = {key: value.to(device) for key, value in batch.items()}
                labels_BS = inputs.pop("labels")
                usage.counted_T = inputs["attention_mask"].reshape(-1) != 0
                logits_BSV = model(**inputs, use_cache=False).logits
                update_perplexity(metric, logits_BSV, labels_BS)
                if agreement is not None:
                    agreement.update(logits_BSV, labels_BS)
                num_tokens += int((labels_BS[:, 1:] != -100).sum())
            nll[name] = _finite_nll(metric, corpus=name)
            if agreement is not None:
                compared[name] = agreement.compute()
    return Evaluation(
        nll_per_corpus=nll,
        num_tokens=num_tokens,
        usage=usage.shares(),
        kl_per_corpus={name: kl for name, (kl, _) in compared.items()},
        agreement_per_corpus={name: share for name, (_, share) in compared.items()},
    )


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
        self.layers = moe_layers(model) if is_moe(model.config) else []
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
