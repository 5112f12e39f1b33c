"""What a repair after NF4 sees: the kept channels with gate and up rows as 4 bit will hold them.

S routed pairs of one expert, n channels of it, k of them kept, b of a block, H hidden.
"""

import torch
from torch import Tensor

from lightning_moe.calibration.gram_sums import GramColumns
from lightning_moe.calibration.routed import ExpertPass, effective_matrices
from lightning_moe.models.discovery import MoeLayer, expert_widths
from lightning_moe.models.products import product
from lightning_moe.models.routers import without_adapter
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.records import PrunePlan

# Rows whose errors are passed on within the cache before the others get theirs in one product.
_BLOCK = 64


class RoundedChannels(GramColumns):
    """`[F, D]`: F `[S, k]` the kept channels with packed gate and up rows, `D = h - F` `[S, n]` what they lack.

    A dropped channel is lacking as a whole. With the old rows W the expert's output is `F W_k + D W`, so that
    `refit_rows` with `lost_dH = W` fits W_k to F. The rows of 4 bit are those that packing will give, scales included;
    of experts that are packed already they are the rows as they are. They are kept for a pass over the text.

    Args:
        plan: which channels stay.
    """

    def __init__(self, *, plan: PrunePlan) -> None:
        self._keep = plan.keep
        self._rows: dict[tuple[int, int], tuple[PackedRows, PackedRows]] = {}

    def kept(self, layer: MoeLayer, expert: int) -> Tensor:
        """Which channels of an expert stay, bool `[n]`."""
        return self._keep[layer.index].split(expert_widths(layer.experts))[expert]

    def count(self, layer: MoeLayer, expert: int) -> int:
        """Number of columns: k + n."""
        keep_n = self.kept(layer, expert)
        return int(keep_n.sum()) + len(keep_n)

    def values(self, layer: MoeLayer, one: ExpertPass) -> Tensor:
        """`[F, D]`, `[S, k + n]`."""
        keep_n = self.kept(layer, one.expert).to(one.hidden_Sn.device)
        gate_kH, up_kH = (
            rows.rows(0, rows.shape[0], one.input_SH.dtype) for rows in self._packed(layer, one.expert, keep_n=keep_n)
        )
        act_fn = without_adapter(layer.experts).get_submodule("act_fn")
        rounded_Sk = act_fn(product(one.input_SH, gate_kH.T)) * product(one.input_SH, up_kH.T)
        lacking_Sn = one.hidden_Sn.clone()
        lacking_Sn[:, keep_n] -= rounded_Sk
        return torch.cat([rounded_Sk, lacking_Sn], dim=1)

    def forget(self, layer: MoeLayer) -> None:
        """Gives up the 4-bit rows of a layer: a pass takes them of its own experts."""
        self._rows = {key: rows for key, rows in self._rows.items() if key[0] != layer.index}

    def _packed(self, layer: MoeLayer, expert: int, *, keep_n: Tensor) -> tuple[PackedRows, PackedRows]:
        key = layer.index, expert
        if key not in self._rows:
            gate_nH, up_nH, _ = effective_matrices(layer.experts, expert, dtype=torch.float32)
            self._rows[key] = PackedRows.pack(gate_nH[keep_n]), PackedRows.pack(up_nH[keep_n])
        return self._rows[key]


def rounded_rows(rows_kH: Tensor, *, gram_kk: Tensor, ridge: float) -> Tensor:
    """Rows of 4-bit values near `argmin || F (Q - W') ||^2`: each row's rounding error is taken up by the next ones.

    Error feedback of GPTQ (arXiv 2210.17323) over channels, those with the largest Gram diagonal first: with
    `U^T U = (G + lambda m I)^-1`, U upper triangular, row c is rounded, and `U[c, j] / U[c, c]` of its error is taken
    off each later row j. In fp32 packing the result gives these rows again; where they are stored in 16 bit in
    between, which rounds them, a few values get another code.

    Args:
        rows_kH: W'.
        gram_kk: G, the Gram of F, `[k, k]`.
        ridge: lambda, relative to m, the mean diagonal of G.
    """
    order_k = gram_kk.diagonal().argsort(descending=True)
    ridged_kk = gram_kk[order_k][:, order_k].double()
    ridged_kk.diagonal().add_(ridge * ridged_kk.diagonal().mean())
    inverse_kk = torch.cholesky_inverse(torch.linalg.cholesky(ridged_kk))
    upper_kk = torch.linalg.cholesky(inverse_kk, upper=True).to(rows_kH.dtype)
    left_kH = rows_kH[order_k]
    for first in range(0, len(left_kH), _BLOCK):
        last = min(first + _BLOCK, len(left_kH))
        error_bH = _round_block(left_kH[first:last], upper_bb=upper_kk[first:last, first:last])
        left_kH[last:] -= upper_kk[first:last, last:].T @ error_bH
    return left_kH[order_k.argsort()]


def _round_block(left_bH: Tensor, *, upper_bb: Tensor) -> Tensor:
    """Rounds a few rows one after the other, in place; returns their errors, divided by the diagonal of U."""
    error_bH = torch.empty_like(left_bH)
    for row in range(len(left_bH)):
        rounded_1H = PackedRows.pack(left_bH[row : row + 1]).rows(0, 1, left_bH.dtype)
        error_bH[row] = (left_bH[row] - rounded_1H[0]) / upper_bb[row, row]
        left_bH[row] = rounded_1H[0]
        left_bH[row + 1 :] -= torch.outer(upper_bb[row, row + 1 :], error_bH[row])
    return error_bH
