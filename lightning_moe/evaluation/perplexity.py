"""Held-out loss per corpus, and which experts the text really used.

B sequences, S positions, V vocabulary, T tokens, K experts per token, E experts.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.text import Perplexity
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lightning_moe.models.discovery import MoeLayer, expert_widths, moe_layers


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Result of one pass over held-out text.

    Args:
        nll_per_corpus: mean next-token loss of each corpus, in nats.
        num_tokens: predicted tokens of all corpora.
        usage: name of each experts module -> share of tokens routed to each expert `[E]`, summing to top-k.
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
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    nll: dict[str, float] = {}
    num_tokens = 0
    with _count_usage(model) as counts:
        for name, loader in loaders.items():
            metric = Perplexity(ignore_index=-100).to(device)
            for batch in tqdm(loader, desc=f"evaluate {name}", leave=False, disable=not progress):
                inputs = {key: value.to(device) for key, value in batch.items()}
                labels_BS = inputs.pop("labels")
                update_perplexity(metric, model(**inputs, use_cache=False).logits, labels_BS)
                num_tokens += int((labels_BS[:, 1:] != -100).sum())
            nll[name] = _finite_nll(metric, corpus=name)
    model.train(was_training)
    usage = {name: count_E / max(total, 1) for name, (count_E, total) in counts.items()}
    return Evaluation(nll_per_corpus=nll, num_tokens=num_tokens, usage=usage)


def _finite_nll(metric: Perplexity, *, corpus: str) -> float:
    if int(metric.count) == 0:
        raise ValueError(f"Corpus '{corpus}' has no token to predict: it is empty or shorter than two tokens.")
    nll = float(metric.compute().log())
    if nll != nll or nll == float("inf"):
        raise ValueError(f"The loss on corpus '{corpus}' is {nll}: the model's weights or its text are broken.")
    return nll


@contextmanager
def _count_usage(model: PreTrainedModel) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Counts routed tokens per expert while the block runs: name of the experts module -> ([E] counts, tokens)."""
    counts: dict[str, tuple[Tensor, int]] = {}
    hooks = [layer.experts.register_forward_pre_hook(_usage_hook(layer, counts)) for layer in moe_layers(model)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _usage_hook(layer: MoeLayer, counts: dict[str, tuple[Tensor, int]]) -> Any:
    num_experts = len(expert_widths(layer.base_experts))

    def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        index_TK = args[1]
        total_E, tokens = counts.get(layer.name, (torch.zeros(num_experts), 0))
        total_E = total_E + torch.bincount(index_TK.reshape(-1), minlength=num_experts).cpu()
        counts[layer.name] = (total_E, tokens + index_TK.shape[0])

    return count
