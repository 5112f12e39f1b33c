"""One expert's down projection, fitted anew by ridge regression on Gram matrices (method, section 5).

C channels of a layer, n channels of one expert (k kept, d dropped), H hidden, L ridges.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative to the mean diagonal of the kept channels' Gram.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# The least ridge for an expert that saw fewer tokens than it has channels: its Gram is singular.
SCARCE_RIDGE = 1e-1


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertRepair:
    """New down rows of one expert.

    Args:
        down_rows: `[k, H]`, in the order of the kept channels.
        ridge: the ridge that was chosen; None when the rows stay as they were.
        error_before: `sum g^2 q ||z' - z||^2` of the cut expert over all tokens, rows as they were.
        error_after: the same with new rows, each half of the tokens predicted from the other half.
    """

    down_rows: Tensor
    ridge: float | None
    error_before: float
    error_after: float


def repaired_down_rows(
    *,
    down_nH: Tensor,
    keep_n: Tensor,
    half_a: Tensor,
    half_b: Tensor,
    num_tokens: int,
    ridges: Sequence[float] = RIDGES,
) -> ExpertRepair:
    """`W' = W_k + (G_kk + lambda m I)^-1 G_kd W_d`: the kept channels stand in for the dropped ones (`refit_rows`).

    Args:
        down_nH: transposed down projection `[n, H]`.
        keep_n: true for a channel that stays.
        half_a: Gram `[n, n]` of one half of the tokens (`LayerGram`).
        half_b: the other half's.
        num_tokens: tokens routed to the expert, both halves together.
        ridges: candidates, relative to the mean diagonal.

    Examples:
        >>> down_nH, keep_n = torch.tensor([[1.0], [2.0]]), torch.tensor([True, False])
        >>> half_nn = torch.full((2, 2), 50.0)  # the two channels are always equal, so one can stand in for both
        >>> repair = repaired_down_rows(down_nH=down_nH, keep_n=keep_n, half_a=half_nn, half_b=half_nn, num_tokens=100)
        >>> round(repair.down_rows.item(), 2)
        3.0
    """
    if bool(keep_n.all()) or not bool(keep_n.any()):
        return unchanged_rows(down_nH[keep_n])
    order_n = torch.cat([keep_n.nonzero(), (~keep_n).nonzero()]).flatten().to(half_a.device)
    kept_kH, dropped_dH = down_nH.index_select(0, order_n).tensor_split([int(keep_n.sum())])
    ordered_a, ordered_b = (half.index_select(0, order_n).index_select(1, order_n) for half in (half_a, half_b))
    return refit_rows(
        kept_kH=kept_kH,
        lost_dH=dropped_dH,
        half_a=ordered_a,
        half_b=ordered_b,
        num_tokens=num_tokens,
        num_channels=len(keep_n),
        ridges=ridges,
    )


def unchanged_rows(rows_kH: Tensor) -> ExpertRepair:
    """The rows as they are, where there is nothing to fit."""
    return ExpertRepair(down_rows=rows_kH.cpu(), ridge=None, error_before=0.0, error_after=0.0)


def refit_rows(
    *,
    kept_kH: Tensor,
    lost_dH: Tensor,
    half_a: Tensor,
    half_b: Tensor,
    num_tokens: int,
    num_channels: int,
    ridges: Sequence[float] = RIDGES,
) -> ExpertRepair:
    """`W' = W + (G_kk + lambda m I)^-1 G_kd V` with `m` the mean diagonal of G_kk (method, section 5).

    The expert's output is `F W + D V`, F what its k channels give and D what they do not; the new rows give as much of
    `D V` as F can: `W' = argmin || F W' - (F W + D V) ||^2 + lambda m ||W' - W||^2`.

    The ridge pulls towards the rows as they were, so few tokens mean little change. It is chosen per expert by
    cross-validation between the two halves of the tokens: only a ridge that, fitted on one half, lowers the error of
    the other by more than a share of `1 / sqrt(num_tokens / 2)`, both ways round, may be used, else the rows stay.
    That is the noise of a mean over so few tokens: an expert that saw 8 must gain half, one that saw 8000 1.6 %. One
    that saw fewer tokens than it has channels gets no ridge below `SCARCE_RIDGE`. The rows are then fitted on all
    tokens.

    Args:
        kept_kH: W, the down rows of the channels that stay.
        lost_dH: V, the rows that D is multiplied with.
        half_a: Gram `[k + d, k + d]` of `[F, D]` over one half of the tokens.
        half_b: the other half's.
        num_tokens: tokens routed to the expert, both halves together.
        num_channels: n, channels the expert had.
        ridges: candidates, relative to the mean diagonal.
    """
    dtype, num_kept = kept_kH.dtype, len(kept_kH)
    kept_kH, lost_dH = (rows.to(half_a) for rows in (kept_kH, lost_dH))
    weight_dd = lost_dH @ lost_dH.T
    a, b = (_SplitGram.of(half, num_kept=num_kept) for half in (half_a, half_b))
    fit_a, fit_b = (_RidgeFit(half, weight_dd=weight_dd, ridges=ridges) for half in (a, b))
    before_2 = torch.stack([half.unrepaired_error(weight_dd) for half in (a, b)])
    after_L2 = torch.stack([fit_b.errors_on(a), fit_a.errors_on(b)], dim=1)
    scarce = num_tokens < num_channels
    allowed_L = torch.tensor([not scarce or ridge >= SCARCE_RIDGE for ridge in ridges], device=after_L2.device)
    best = _best_ridge(before_2, after_L2, allowed_L=allowed_L, num_tokens=num_tokens)
    if best is None:
        total = float(before_2.sum())
        return ExpertRepair(down_rows=kept_kH.to(dtype).cpu(), ridge=None, error_before=total, error_after=total)
    rows_kH = kept_kH + (a + b).ridge_solution(ridges[best]) @ lost_dH
    return ExpertRepair(
        down_rows=rows_kH.to(dtype).cpu(),
        ridge=ridges[best],
        error_before=float(before_2.sum()),
        error_after=float(after_L2[best].sum()),
    )


def _best_ridge(before_2: Tensor, after_L2: Tensor, *, allowed_L: Tensor, num_tokens: int) -> int | None:
    noise = min(1.0, (2 / max(1, num_tokens)) ** 0.5)
    allowed_L = allowed_L & (after_L2 < before_2 * (1 - noise)).all(1)
    total_L = after_L2.sum(1).masked_fill(~allowed_L, torch.inf)
    return int(total_L.argmin()) if bool(allowed_L.any()) else None


@dataclass(frozen=True, kw_only=True, eq=False)
class _SplitGram:
    """A Gram, split into kept and dropped channels."""

    kk: Tensor
    kd: Tensor
    dd: Tensor

    @classmethod
    def of(cls, gram_nn: Tensor, *, num_kept: int) -> "_SplitGram":
        """Rows and columns of the kept channels come first."""
        kept_kn, dropped_dn = gram_nn.tensor_split([num_kept])
        return cls(kk=kept_kn[:, :num_kept], kd=kept_kn[:, num_kept:], dd=dropped_dn[:, num_kept:])

    def __add__(self, other: "_SplitGram") -> "_SplitGram":
        return _SplitGram(kk=self.kk + other.kk, kd=self.kd + other.kd, dd=self.dd + other.dd)

    def unrepaired_error(self, weight_dd: Tensor) -> Tensor:
        """`tr(W_d^T G_dd W_d)`, summed in float64."""
        return (self.dd * weight_dd).sum(dtype=torch.float64)

    def ridge_strength(self, ridge: float) -> Tensor:
        """`lambda m`."""
        return ridge * self.kk.diagonal().mean().clamp_min(torch.finfo(self.kk.dtype).tiny)

    def ridge_solution(self, ridge: float) -> Tensor:
        """`S = (G_kk + lambda m I)^-1 G_kd` `[k, d]`, solved in float64."""
        ridged_kk = self.kk.to(torch.float64, copy=True)
        ridged_kk.diagonal().add_(self.ridge_strength(ridge))
        return torch.cholesky_solve(self.kd.double(), torch.linalg.cholesky(ridged_kk)).to(self.kd.dtype)


class _RidgeFit:
    """`S = (G_kk + lambda m I)^-1 G_kd` for all ridges from one eigendecomposition `G_kk = U diag(v) U^T`.

    With `P = U^T G_kd` and `s = 1 / (v + lambda m)` it is `S = U diag(s) P`, so the error `tr(D^T B D)` of the new rows
    on any Gram B, `D = [S W_d; -W_d]`, is a quadratic in s: `s^T Q s - 2 r^T s + const`. The terms may be 10^8 times
    their sum, so they are added in float64; products and eigenvectors have the Gram's own type. With a float32 Gram,
    errors below some 10^-7 of the one without repair are therefore noise. Where a few tokens are a thousand times as
    large as the others, even larger ones may be several per cent off: the others are the Gram's last digits.
    """

    def __init__(self, gram: _SplitGram, *, weight_dd: Tensor, ridges: Sequence[float]) -> None:
        value_k, self.basis_kk = torch.linalg.eigh(gram.kk)
        self.projected_kd = self.basis_kk.T @ gram.kd
        self.weight_dd = weight_dd
        strength_L = torch.stack([gram.ridge_strength(ridge) for ridge in ridges])
        self.inverse_Lk = 1 / (value_k.clamp_min(0) + strength_L.unsqueeze(1))

    def errors_on(self, gram: _SplitGram) -> Tensor:
        """Error of each ridge's rows on another Gram, float64 `[L]`, at least 0."""
        basis_kk, weighted_kd = self.basis_kk, self.projected_kd @ self.weight_dd
        turned_kk = basis_kk.T @ gram.kk @ basis_kk
        quadratic_kk = (turned_kk * (weighted_kd @ self.projected_kd.T)).double()
        linear_k = ((basis_kk.T @ gram.kd) * weighted_kd).sum(1, dtype=torch.float64)
        inverse_Lk = self.inverse_Lk.double()
        quadratic_L = ((inverse_Lk @ quadratic_kk) * inverse_Lk).sum(1)
        return (quadratic_L - 2 * inverse_Lk @ linear_k + gram.unrepaired_error(self.weight_dd)).clamp_min(0)
