"""How close a model's next-token distribution is to the dense model's, on the same held-out text.

B sequences, S positions, N predicted tokens of a batch, H hidden, V vocabulary.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lightning_moe.calibration.observer import evaluating
from lightning_moe.progress import hidden as bar_hidden

# Log-probabilities of so many tokens are in memory at once: 50 MB each for a vocabulary of 49,152.
_TOKENS_AT_ONCE = 256
# So many show the factor between the head's output and the logits.
_TOKENS_OF_SCALE = 16

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class _DenseBatch:
    """What is kept of a batch: the predicted tokens, and what the dense model's head read before each."""

    token_N: Tensor
    hidden_NH: Tensor


def predicted(labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Positions `[B, S]` (bool) whose next token counts, and those tokens `[N]`: label -100 does not count."""
    next_BS = torch.cat([labels_BS[:, 1:], torch.full_like(labels_BS[:, :1], -100)], dim=1)
    counted_BS = next_BS != -100
    return counted_BS, next_BS[counted_BS]


def _indices(counted_BS: Tensor) -> Tensor:
    """Sequence and position of each predicted token `[2, N]`: a part of the logits is read without copying them all."""
    return torch.stack(counted_BS.nonzero(as_tuple=True))


def divergence(logits_NV: Tensor, dense_logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(dense || model) of each token in nats `[N]`, and whether both find the same token likeliest `[N]`."""
    logprob_NV, dense_NV = logits_NV.float().log_softmax(-1), dense_logits_NV.float().log_softmax(-1)
    kl_N = (dense_NV.exp() * (dense_NV - logprob_NV)).sum(-1)
    return kl_N, logits_NV.argmax(-1) == dense_logits_NV.argmax(-1)


class DenseReference:
    """The dense model's next-token distributions on held-out text, kept as the inputs of its language-model head.

    The head turns them into the same logits again: H numbers a token in the model's own type and not V, in memory, and
    one matrix product when they are needed. 100,000 tokens of a model of hidden size 2048 in bfloat16 take 0.4 GB.

    Make it with `DenseReference.measure`; it stays right whatever happens to the model afterwards.
    """

    def __init__(self, *, head: nn.Module, scale: float, corpora: Mapping[str, list[_DenseBatch]]) -> None:
        self._head = head
        self._scale = scale
        self._corpora = corpora

    @classmethod
    @torch.no_grad()
    def measure(
        cls, model: PreTrainedModel, *, loaders: Mapping[str, Iterable[Batch]], progress: bool = True
    ) -> "DenseReference":
        """Runs the dense model over every corpus once; batches hold `input_ids`, `attention_mask`, `labels`, `[B, S]`.

        Raises:
            ValueError: the model's logits are not its head's output times a constant.
        """
        head: Any = model.get_output_embeddings()
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        corpora: dict[str, list[_DenseBatch]] = {}
        scale: float | None = None
        try:
            with evaluating(model):
                for name, loader in loaders.items():
                    corpora[name] = []
                    bar = tqdm(loader, desc=f"dense {name}", leave=False, disable=bar_hidden(progress=progress))
                    for batch in bar:
                        inputs = {key: value.to(model.device) for key, value in batch.items()}
                        counted_BS, token_N = predicted(inputs.pop("labels"))
                        seen.clear()
                        logits_BSV = model(**inputs, use_cache=False).logits
                        hidden_NH = seen[0][counted_BS]
                        corpora[name].append(_DenseBatch(token_N=token_N.cpu(), hidden_NH=hidden_NH.cpu()))
                        if scale is None:
                            index_2N = _indices(counted_BS)[:, :_TOKENS_OF_SCALE]
                            scale = _head_scale(head, hidden_NH[:_TOKENS_OF_SCALE], logits_BSV[tuple(index_2N)])
        finally:
            hook.remove()
        return cls(head=copy.deepcopy(head), scale=scale or 1.0, corpora=corpora)

    def against(self, corpus: str) -> "Agreement":
        """What adds up the comparison on one corpus.

        Raises:
            ValueError: the dense model was not run on that corpus.
        """
        if corpus not in self._corpora:
            raise ValueError(f"The dense model was run on the corpora {sorted(self._corpora)}, not on '{corpus}'.")
        return Agreement(reference=self, batches=self._corpora[corpus], corpus=corpus)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """The dense model's logits `[N, V]`."""
        return self._head(hidden_NH) * self._scale


def _head_scale(head: nn.Module, hidden_NH: Tensor, logits_NV: Tensor) -> float | None:
    """The factor some families put between the head's output and the logits (Granite); None without a token."""
    if not len(hidden_NH):
        return None
    raw_NV = head(hidden_NH).double()
    asked_NV = logits_NV.double()
    scale = float((raw_NV * asked_NV).sum() / raw_NV.square().sum())
    if not torch.allclose(raw_NV * scale, asked_NV, rtol=2e-2, atol=1e-2 * float(asked_NV.abs().max())):
        raise ValueError("The logits of this model are not its head's output times a constant: no reference of it.")
    return scale


class Agreement:
    """Sums of one corpus; batches must come as the dense model saw them.

    Args:
        reference: of the dense model.
        batches: what it kept of the corpus.
        corpus: named in messages.
    """

    def __init__(self, *, reference: DenseReference, batches: list[_DenseBatch], corpus: str) -> None:
        self._reference = reference
        self._batches = iter(batches)
        self._corpus = corpus
        self._kl = self._same = 0.0
        self._num_tokens = 0

    @torch.no_grad()
    def update(self, logits_BSV: Tensor, labels_BS: Tensor) -> None:
        """Adds a batch.

        Raises:
            ValueError: the dense model saw another text or vocabulary.
        """
        counted_BS, token_N = predicted(labels_BS)
        dense = next(self._batches, None)
        if dense is None or not torch.equal(dense.token_N, token_N.cpu()):
            raise ValueError(f"The dense model saw other batches of corpus '{self._corpus}'. Use the same loaders.")
        index_2N = _indices(counted_BS)
        for start in range(0, len(token_N), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            logits_NV = logits_BSV[tuple(index_2N[:, part])]
            dense_logits_NV = self._reference.logits(dense.hidden_NH[part].to(logits_NV.device))
            if dense_logits_NV.shape[-1] != logits_NV.shape[-1]:
                raise ValueError(
                    f"The dense model has {dense_logits_NV.shape[-1]} tokens and this one {logits_NV.shape[-1]}: "
                    "only models of one tokenizer can be compared."
                )
            kl_N, same_N = divergence(logits_NV, dense_logits_NV)
            self._kl += float(kl_N.double().sum())
            self._same += float(same_N.sum())
        self._num_tokens += len(token_N)

    def compute(self) -> tuple[float, float]:
        """(KL in nats per token, share of tokens for which both models' likeliest next token is the same)."""
        return self._kl / self._num_tokens, self._same / self._num_tokens
