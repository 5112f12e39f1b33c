"""lm_eval's language model over a model in memory, fast at what zero-shot tasks ask: log-probabilities of choices.

S tokens in a row, T tokens of a text, P positions whose logits are needed, V vocabulary.

The choices of an item share their context. It is computed once: a row holds contexts, each followed by its choices as
branches, and an attention mask lets a token see its own context and its own branch only. Logits are made only at
positions that predict a choice's token. Numbers are those of one request at a time, up to rounding (tested).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_moe.models.config_values import implementations

_AnyHFLM: Any = HFLM  # the decorator of lm_eval's registry hides its type
Request = tuple[Any, list[int], list[int]]  # (context and continuation as text, tokens of each)


@dataclass(eq=False)
class _Tree:
    """A context and its continuations: which requests they answer."""

    context: list[int]
    continuations: list[list[int]] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Tokens that are computed: the last one of each continuation predicts nothing that is asked."""
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)


class PackedLM(_AnyHFLM):
    """lm_eval's wrapper of a transformers model, with its own way of scoring continuations.

    Args:
        model: any causal language model, in memory.
        tokenizer: its tokenizer.
        row_tokens: tokens in a row; longer items have a row of their own.
        generation_batch_size: prompts generated from at once.
        progress: show bars where somebody watches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
        row_tokens: int = 256,
        generation_batch_size: int = 16,
        progress: bool = True,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=generation_batch_size,
        )
        self.row_tokens = row_tokens
        self.packs = _sees_by_mask(model)
        self.silent = not progress or not sys.stderr.isatty()
        self.num_tokens: dict[tuple[str, str], int] = {}
        self.num_computed = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation after its context."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.silent)

    @override
    def _loglikelihood_tokens(  # pyright: ignore[reportGeneralTypeIssues]: the base is `Any` to it
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The same for tokens."""
        self.num_tokens |= {key: len(continuation) for key, _, continuation in requests if key is not None}
        if not self.packs:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        trees = _trees(requests, max_length=self.max_length)
        with tqdm(total=len(requests), desc="choices", leave=False, disable=disable_tqdm) as bar:
            for row in _rows(trees, row_tokens=self.row_tokens):
                for index, answer in _score(self.model, row, device=self.device):
                    answers[index] = answer
                self.num_computed += sum(tree.size for tree in row)
                bar.update(sum(len(tree.requests) for tree in row))
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy or sampled text after each prompt, as lm_eval's own."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm or self.silent)


def _sees_by_mask(model: PreTrainedModel) -> bool:
    """Whether a mask of shape [1, 1, S, S] alone decides what a token sees.

    Not so with linear attention, attention windows, or kernels that take no mask.
    """
    config = model.config.get_text_config().to_dict()
    kinds, window = set(config.get("layer_types") or ()), config.get("sliding_window")
    everything = kinds == {"full_attention"} if kinds else not window
    return everything and implementations(model.config)["attn"] in ("sdpa", "eager")


def _trees(requests: Sequence[Request], *, max_length: int) -> list[_Tree]:
    """Requests of the same context together, longest first; what is too long loses its beginning, as in lm_eval."""
    trees: dict[tuple[int, ...], _Tree] = {}
    for index, (_, context, continuation) in enumerate(requests):
        context = context[max(0, len(context) + len(continuation) - max_length - 1) :]
        tree = trees.setdefault(tuple(context), _Tree(context))
        tree.continuations.append(continuation)
        tree.requests.append(index)
    return sorted(trees.values(), key=lambda tree: -tree.size)


def _rows(trees: Sequence[_Tree], *, row_tokens: int) -> Iterator[list[_Tree]]:
    """Trees side by side, as many as fit into a row."""
    row: list[_Tree] = []
    for tree in trees:
        if row and sum(other.size for other in row) + tree.size > row_tokens:
            yield row
            row = []
        row.append(tree)
    if row:
        yield row


@dataclass(frozen=True, eq=False)
class _Layout:
    """A row of trees as the model reads it.

    Args:
        trunk_S: number of each token's tree.
        branch_S: number of its branch in that tree; 0: the context.
        predicts: for each request, the positions whose logits predict its tokens.
    """

    input_ids_S: Tensor
    position_S: Tensor
    trunk_S: Tensor
    branch_S: Tensor
    predicts: list[tuple[int, list[int], list[int]]]

    def mask(self, *, dtype: torch.dtype) -> Tensor:
        """0 where a token (row) sees another (column), the lowest number elsewhere, `[1, 1, S, S]`."""
        same_tree_SS = self.trunk_S[:, None] == self.trunk_S
        on_path_SS = (self.branch_S == 0) | (self.branch_S[:, None] == self.branch_S)
        sees_SS = (same_tree_SS & on_path_SS).tril()
        return torch.zeros(sees_SS.shape, dtype=dtype).masked_fill(~sees_SS, torch.finfo(dtype).min)[None, None]


def _lay_out(row: Sequence[_Tree]) -> _Layout:
    ids: list[int] = []
    positions: list[int] = []
    trunks: list[int] = []
    branches: list[int] = []
    predicts: list[tuple[int, list[int], list[int]]] = []
    for number, tree in enumerate(row):
        start, length = len(ids), len(tree.context)
        pieces = [(0, tree.context, 0)]
        pieces += [(i, tokens[:-1], length) for i, tokens in enumerate(tree.continuations, start=1)]
        for branch, tokens, first in pieces:
            here = len(ids)
            ids += tokens
            positions += range(first, first + len(tokens))
            trunks += [number] * len(tokens)
            branches += [branch] * len(tokens)
            if branch:
                at = [start + length - 1, *range(here, here + len(tokens))]
                predicts.append((tree.requests[branch - 1], at, tree.continuations[branch - 1]))
    columns = (torch.tensor(column) for column in (ids, positions, trunks, branches))
    return _Layout(*columns, predicts=predicts)


@torch.no_grad()
def _score(
    model: PreTrainedModel, row: Sequence[_Tree], *, device: torch.device
) -> list[tuple[int, tuple[float, bool]]]:
    """(number of the request, its answer) for every request of a row."""
    layout = _lay_out(row)
    needed = sorted({position for _, at, _ in layout.predicts for position in at})
    place = {position: index for index, position in enumerate(needed)}
    with _only_positions(model, torch.tensor(needed, device=device)):
        logits_PV = model(
            input_ids=layout.input_ids_S[None].to(device),
            position_ids=layout.position_S[None].to(device),
            attention_mask=layout.mask(dtype=model.dtype).to(device),
            use_cache=False,
        ).logits[0]
    logprobs_PV = logits_PV.float().log_softmax(-1)
    greedy_P = logprobs_PV.argmax(-1)
    answers: list[tuple[int, tuple[float, bool]]] = []
    for request, at, tokens in layout.predicts:
        at_T = torch.tensor([place[position] for position in at], device=device)
        token_T = torch.tensor(tokens, device=device)
        is_greedy = bool((greedy_P[at_T] == token_T).all())
        answers.append((request, (float(logprobs_PV[at_T, token_T].sum()), is_greedy)))
    return answers


@contextmanager
def _only_positions(model: PreTrainedModel, position_P: Tensor) -> Iterator[None]:
    """The language-model head sees only some positions of its input `[1, S, H]` inside the block."""

    def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][:, position_P],)

    head: Any = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
