"""Paper B: corpora take turns protecting experts of a layer, the aggregate score fills the other places (method, 4)."""

# K corpora, L layers, E experts

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_moe.allocation.budget import check_prune_ratio, keep_everything
from lightning_moe.allocation.expert_dropping import drop_experts, num_kept_experts
from lightning_moe.records import ExpertScores


def _rank_sum(utility_KE: Tensor, _: Tensor) -> Tensor:
    """Experts that this one beats, summed over corpora; equals by their utility, as a share of the corpus' largest.

    Experts of the same utility beat the same ones, whatever their order.
    """
    beaten_KE = (utility_KE[:, :, None] > utility_KE[:, None, :]).sum(2).double()
    share_KE = utility_KE / utility_KE.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return beaten_KE.sum(0) + 0.5 * share_KE.mean(0)


# (utility [K, E], tokens [K]) -> aggregate [E]
FILLS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda utility_KE, _: utility_KE.sum(0),
    "mean": lambda utility_KE, tokens_K: tokens_K @ utility_KE / tokens_K.sum(),
    "max": lambda utility_KE, _: utility_KE.amax(0),
    "rank": _rank_sum,
}
# The criterion on the sums of all corpora, as a method without coverage sees them.
POOLED = "pooled"


def take_turns(score_KE: Tensor, *, num_protected: int) -> Tensor:
    """Which experts of a layer the corpora protect, and how early.

    Corpora take turns in the order of the rows. In its turn a corpus protects its best expert that is still free,
    equals by index; one that finds only scores of 0 passes, and protection ends early when all of them do.

    Args:
        score_KE: Scores of each corpus, not negative.
        num_protected: Turns that protect something, at most E.

    Returns:
        int64 [E]: 0 for an expert that is not protected, else the number of experts protected from this turn on, so
        that the first one has the highest number.

    Examples:
        >>> score_KE = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]])
        >>> take_turns(score_KE, num_protected=2).tolist()  # both want expert 0; the second takes its next best
        [2, 0, 1]
    """
    free_KE, left = score_KE.clone(), num_protected
    turn_E = torch.zeros(score_KE.shape[1], dtype=torch.long)
    while left and bool(free_KE.any()):
        for score_E in free_KE:
            best = int(score_E.argmax())
            if left and score_E[best] > 0:
                turn_E[best], left = left, left - 1
                free_KE[:, best] = 0.0
    return turn_E


def cover_experts(
    pooled: ExpertScores,
    *,
    utilities: Sequence[Tensor],
    tokens_K: Tensor,
    fill: str,
    protected_share: float,
    protected_count: int | None,
    prune_ratio: float,
) -> tuple[Tensor, ...]:
    """Every layer keeps its `round((1 - prune_ratio) * E)` experts: first the protected ones, then by the aggregate.

    Args:
        pooled: Expert scores of all corpora together; decide where `fill` is `pooled`.
        utilities: Per layer float64 [K, E], comparable between corpora, not negative; rows in the order of the turns.
        tokens_K: Tokens of the corpora, weights of the fill rule `mean`.
        fill: A name of `FILLS`, or `pooled`.
        protected_share: Share of the kept places that is protected, in [0, 1].
        protected_count: Number of protected places of a layer, instead of the share.
        prune_ratio: Share of experts to remove, in [0, 1); 0 keeps everything.

    Returns:
        Per layer bool [C], true for a channel that stays.

    Raises:
        ValueError: a ratio out of range, more protected than kept, or fewer kept than a token needs: names the layer.
    """
    check_prune_ratio(prune_ratio)
    if prune_ratio == 0:
        return keep_everything(pooled.shape)
    protected = []
    for layer, utility_KE in zip(pooled.shape.layers, utilities, strict=True):
        num_kept = num_kept_experts(layer, prune_ratio=prune_ratio)
        num_protected = round(protected_share * num_kept) if protected_count is None else protected_count
        if num_protected > num_kept:
            raise ValueError(
                f"{layer.name}: `protected_count`={num_protected} is more than the {num_kept} experts that "
                f"`prune_ratio`={prune_ratio} keeps of {layer.num_experts}. Protect fewer, or prune less."
            )
        present_E = torch.tensor(layer.widths) > 0
        protected.append(take_turns(utility_KE * present_E, num_protected=num_protected))
    aggregate = pooled if fill == POOLED else _aggregate(pooled, utilities=utilities, tokens_K=tokens_K, fill=fill)
    return drop_experts(aggregate, prune_ratio=prune_ratio, protected=protected)


def _aggregate(pooled: ExpertScores, *, utilities: Sequence[Tensor], tokens_K: Tensor, fill: str) -> ExpertScores:
    scores = tuple(FILLS[fill](utility_KE, tokens_K) for utility_KE in utilities)
    return ExpertScores(shape=pooled.shape, criterion=f"{pooled.criterion}, {fill}", scores=scores)
