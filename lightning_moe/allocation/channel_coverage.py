"""Ours: corpora take turns protecting blocks of channels, the rest of one exact budget goes by the aggregate score."""

# K corpora, C channels of a layer, A channels of all layers, E experts, N channels of the widest expert

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_moe.allocation.budget import block_budget, check_prune_ratio, keep_everything
from lightning_moe.allocation.floors import Floors
from lightning_moe.allocation.global_ranking import rank_globally
from lightning_moe.allocation.ranking import as_rectangle
from lightning_moe.records import ChannelScores, LayerShape, ModelShape


def cover_corpora(
    shape: ModelShape,
    *,
    scores: Sequence[Tensor],
    protected_share: float,
    prune_ratio: float,
    align: int = 16,
    floors: Floors | None = None,
) -> tuple[Tensor, ...]:
    """Keeps as many blocks as `rank_globally`, of which `protected_share` are the corpora's own choice.

    Paper B's round robin (method, 4) with blocks of channels instead of experts, over the whole model instead of one
    layer. In its turn a corpus looks at each expert's `align` best channels, by its own score, that are still free, and
    protects the ones that sum to the most: so an expert's kept channels need not be the first ones of any single
    ranking, and kept widths are multiples of `align` all the same. What the budget still has goes to the best blocks of
    free channels by the sum over corpora. Reachability and floors come before the protected blocks.

    Args:
        shape: The model.
        scores: Per layer float64 [K, C], comparable between layers and between corpora, not negative.
        protected_share: Share of the kept blocks that is protected, in [0, 1]; 0 is `rank_globally` of the sum.
        prune_ratio: Share of channels to remove, in [0, 1); 0 keeps everything.
        align: Channels of a block.
        floors: What layers and experts keep at least; a protected expert keeps one block.

    Returns:
        Per layer bool [C], true for a channel that stays.

    Raises:
        ValueError: a setting out of range, or a budget smaller than what is reserved: names the layer and the numbers.
    """
    check_prune_ratio(prune_ratio)
    if prune_ratio == 0:
        return keep_everything(shape)
    num_blocks = block_budget(shape, prune_ratio=prune_ratio, align=align)
    protected = protect_blocks(shape, scores=scores, num_blocks=round(protected_share * num_blocks), align=align)
    total = [score_KC.sum(0) for score_KC in scores]
    # A protected channel outweighs any block of free ones, so it leads its expert's ranking and the model's.
    lift = 1.0 + sum(float(total_C.sum()) for total_C in total)
    lifted = tuple(total_C + lift * keep_C for total_C, keep_C in zip(total, protected, strict=True))
    ranking = ChannelScores(shape=shape, criterion="coverage", scores=lifted)
    return rank_globally(ranking, prune_ratio=prune_ratio, align=align, floors=floors)


def protect_blocks(shape: ModelShape, *, scores: Sequence[Tensor], num_blocks: int, align: int) -> list[Tensor]:
    """The channels that corpora protect in `num_blocks` turns: bool [C] per layer, a multiple of `align` per expert.

    Corpora take turns in the order of the rows. One that finds only scores of 0 passes; protection ends early when all
    of them do. Equals: the expert of the lower index.

    Examples:
        >>> first_C, second_C = [5.0, 4.0, 3.0, 0.0], [9.0, 0.0, 1.0, 2.0]  # two corpora, two experts of two channels
        >>> score_KC = torch.tensor([first_C, second_C], dtype=torch.float64)
        >>> protect_blocks(shape_of([2, 2]), scores=[score_KC], num_blocks=2, align=1)[0].tolist()  # 0, then 3
        [True, False, False, True]
    """
    free_A = np.ones(shape.num_channels, dtype=bool)
    waiting = [_Corpus(shape, scores=rows, free_A=free_A, align=align) for rows in zip(*scores, strict=True)]
    left = num_blocks
    while left and waiting:
        for corpus in list(waiting):
            if not corpus.protect():
                waiting.remove(corpus)
                continue
            left -= 1
            if not left:
                break
    return list(torch.from_numpy(~free_A).split([layer.num_channels for layer in shape.layers]))


class _Corpus:
    """One corpus: its ranking of each expert's channels, and a queue of the experts by their best free block.

    Entries of the queue may be too good, never too bad: others protect channels meanwhile, which can only lower the sum
    of an expert's best free ones. So an entry is computed anew when it comes up, and taken if nothing changed.
    """

    def __init__(self, shape: ModelShape, *, scores: Sequence[Tensor], free_A: np.ndarray, align: int) -> None:
        self.score_A = torch.cat(list(scores)).numpy()
        self.free_A = free_A
        self.align = align
        self.orders: list[np.ndarray] = []
        for layer, score_C in zip(shape.layers, scores, strict=True):
            self.orders += _expert_orders(layer, score_C=score_C, offset=sum(map(len, self.orders)))
        entries = ((-self._best_block(expert)[0], expert) for expert in range(len(self.orders)))
        self.queue = [entry for entry in entries if entry[0] < 0]
        heapq.heapify(self.queue)

    def protect(self) -> bool:
        """Protects the best free block of the model; false if none has a score above 0."""
        while self.queue:
            value, expert = self.queue[0]
            score, block = self._best_block(expert)
            if -score == value:
                self.free_A[block] = False
                score, _ = self._best_block(expert)
                self._replace(score, expert=expert)
                return True
            self._replace(score, expert=expert)
        return False

    def _replace(self, score: float, *, expert: int) -> None:
        if score > 0:
            heapq.heapreplace(self.queue, (-score, expert))
        else:
            heapq.heappop(self.queue)

    def _best_block(self, expert: int) -> tuple[float, np.ndarray]:
        """The `align` best free channels and their sum; 0 where fewer are free."""
        order = self.orders[expert]
        block = order[self.free_A[order]][: self.align]
        return (float(self.score_A[block].sum()) if len(block) == self.align else 0.0), block


def _expert_orders(layer: LayerShape, *, score_C: Tensor, offset: int) -> list[np.ndarray]:
    """Each expert's channels as places in [A], best first; `offset` is the layer's first place."""
    score_EN, _ = as_rectangle(score_C, widths=layer.widths)
    order_EN = score_EN.argsort(dim=1, descending=True, stable=True)
    first_E = torch.tensor(layer.offsets[:-1]) + offset
    place_EN = (order_EN + first_E[:, None]).numpy()
    return [place_EN[expert, :width] for expert, width in enumerate(layer.widths)]
