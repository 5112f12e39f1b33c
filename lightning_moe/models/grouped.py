"""Routing and grouped matrix products: the arithmetic every experts module here is made of.

T tokens, K experts per token, S = T*K routed pairs sorted by expert, G experts of equal width, n channels, H hidden,
C rows of a run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_moe.models.products import product, product_pays

# (first row, one past the last row, dtype) -> rows [n, H]
RowLoader = Callable[[int, int, torch.dtype], Tensor]

# Dense fp32 rows of one projection in one run: some of the last-level cache; a fraction of a GPU's memory.
_RUN_BYTES_CPU, _RUN_BYTES_GPU = 4 * 2**20, 256 * 2**20
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPED_CAPABILITIES = (9, 10)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Routed pairs sorted by expert slot; made once per layer and call.

    Args:
        order_S: position of each sorted pair in the flattened `[T, K]` indices.
        token_S: token of each sorted pair.
        bounds: `num_slots + 1` offsets into the sorted pairs (one host sync a layer).
    """

    order_S: Tensor
    token_S: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def sort(cls, slot_TK: Tensor, *, num_slots: int) -> "Routing":
        """Sorts the pairs of `slot_TK` (int64, values in [0, num_slots)) by slot, stably.

        Examples:
            >>> routing = Routing.sort(torch.tensor([[1, 0], [0, 2]]), num_slots=3)  # two tokens, two experts each
            >>> routing.token_S.tolist(), routing.bounds
            ([0, 1, 0, 1], (0, 2, 3, 4))
        """
        sorted_S, order_S = slot_TK.reshape(-1).sort(stable=True)
        # Not bincount, which waits for a GPU once more.
        ends = torch.searchsorted(sorted_S, torch.arange(num_slots, device=sorted_S.device), right=True)
        return cls(order_S=order_S, token_S=order_S // slot_TK.shape[1], bounds=(0, *ends.tolist()))

    def combine(self, output_SH: Tensor, weights_TK: Tensor) -> Tensor:
        """Weights the sorted outputs and adds each token's K: `[S, H] -> [T, H]` (no atomic adds: deterministic).

        Routers that give fp32 weights get fp32 products and sums, as in the stock experts.
        """
        num_tokens, top_k = weights_TK.shape
        weighted_SH = output_SH * weights_TK.reshape(-1)[self.order_S].unsqueeze(-1)
        inverse_S = torch.empty_like(self.order_S)
        inverse_S[self.order_S] = torch.arange(len(inverse_S), device=inverse_S.device)
        return weighted_SH[inverse_S].view(num_tokens, top_k, output_SH.shape[1]).sum(1)


@dataclass(frozen=True, kw_only=True)
class WidthGroup:
    """Experts of equal width: consecutive slots, one contiguous block of rows."""

    first_slot: int
    num_experts: int
    width: int
    first_row: int

    @property
    def num_rows(self) -> int:
        """Rows of the block."""
        return self.num_experts * self.width


@dataclass(frozen=True, kw_only=True)
class ExpertRun:
    """Neighbouring experts of one width, computed in one grouped product.

    Args:
        first: position of the first one in its width group.
        width: n.
        start: first pair of the run, counted like the bounds it was made from.
        bounds: offsets of each expert's pairs in the run's own pairs (one more than experts, from 0).
    """

    first: int
    width: int
    start: int
    bounds: tuple[int, ...]

    @classmethod
    def cut(cls, group: WidthGroup, bounds: tuple[int, ...], *, first: int, last: int) -> "ExpertRun":
        """Experts `first:last` of a group whose experts' pairs begin at `bounds` (one more than experts)."""
        local = tuple(bound - bounds[first] for bound in bounds[first : last + 1])
        return cls(first=first, width=group.width, start=bounds[first], bounds=local)

    @property
    def num_experts(self) -> int:
        """G."""
        return len(self.bounds) - 1

    @property
    def stop(self) -> int:
        """One past the last pair, counted like `start`."""
        return self.start + self.bounds[-1]

    def load(self, loader: RowLoader, dtype: torch.dtype) -> Tensor:
        """The run's rows of one projection as `[G, n, H]`; the loader counts from the group's first row."""
        first_row = self.first * self.width
        rows_CH = loader(first_row, first_row + self.num_experts * self.width, dtype)
        return rows_CH.view(self.num_experts, self.width, -1)


def expert_runs(
    group: WidthGroup, bounds: tuple[int, ...], *, hidden_size: int, packed: bool, device: torch.device
) -> list[ExpertRun]:
    """Splits the experts of one width into runs; together they hold every pair of the group, in order.

    A run's dense rows of one projection stay below a limit (but a run has at least one expert): on a CPU they stay in
    the cache, on a GPU a run is normally the whole group. Experts without pairs are left out where that saves
    something: on a CPU always, on a GPU where rows are packed and at most half of the experts have pairs.

    Args:
        group: experts of one width.
        bounds: offsets of each expert's pairs (one more than experts; `Routing.bounds` cut to the group's slots).
        hidden_size: H.
        packed: rows must be dequantised, so that loading costs.
        device: where the product is computed.
    """
    on_cpu = device.type == "cpu"
    most = max(1, run_bytes(device.type) // max(1, 4 * group.width * hidden_size))
    hit = [g for g in range(group.num_experts) if bounds[g] < bounds[g + 1]]
    few = packed and 2 * len(hit) <= group.num_experts
    chosen = hit if on_cpu or few else range(group.num_experts)
    runs = [ExpertRun.cut(group, bounds, first=first, last=last) for first, last in _stretches(chosen, most=most)]
    return [run for run in runs if run.bounds[-1]]


def run_bytes(device_type: str) -> int:
    """Limit of a run's dense fp32 rows of one projection on a device of this type."""
    return _RUN_BYTES_CPU if device_type == "cpu" else _RUN_BYTES_GPU


def _stretches(positions: Sequence[int], *, most: int) -> Iterator[tuple[int, int]]:
    """Stretches `[first, last)` of neighbouring positions (sorted), none longer than `most`."""
    first = 0
    for index in range(1, len(positions) + 1):
        ends = index == len(positions) or positions[index] != positions[index - 1] + 1
        if ends or index - first == most:
            yield positions[first], positions[index - 1] + 1
            first = index


def width_groups(sorted_widths: Sequence[int]) -> Iterator[WidthGroup]:
    """The groups of experts that are stored in the order of their widths."""
    slot = row = 0
    for width, members in groupby(sorted_widths):
        count = len(list(members))
        yield WidthGroup(first_slot=slot, num_experts=count, width=width, first_row=row)
        slot, row = slot + count, row + count * width


def grouped_matmul(input_Sk: Tensor, weight_Gkn: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Rows `bounds[g]:bounds[g+1]` of the input times matrix g: `[S, k] x [G, k, n] -> [S, n]`.

    One call of `torch.nn.functional.grouped_mm` where its alignment (16 bytes) and types allow and it is not a loop
    that waits for the GPU; else a loop of mm, for which the offsets are on the host already. The width of the output
    counts too: it is the row stride of the gradient that backward multiplies. On a CPU that call is a loop as well, so
    `product` replaces it where that is faster.
    """
    if len(bounds) == 2:
        return product(input_Sk, weight_Gkn[0])
    if product_pays(input_Sk, weight_Gkn, num_groups=len(weight_Gkn)):
        return torch.cat([product(input_Sk[a:b], weight_Gkn[g]) for g, (a, b) in enumerate(pairwise(bounds))])
    rows_fit = weight_Gkn.shape[2] * weight_Gkn.element_size() % 16 == 0
    if rows_fit and _aligned(input_Sk) and _aligned(weight_Gkn) and input_Sk.dtype == weight_Gkn.dtype:
        return functional.grouped_mm(input_Sk, weight_Gkn, offs=_offsets(bounds, input_Sk))
    return torch.cat([input_Sk[a:b] @ weight_Gkn[g] for g, (a, b) in enumerate(pairwise(bounds))])


def grouped_outer(left_Sm: Tensor, right_Sn: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Per group `left^T right` over its own rows: `[S, m], [S, n] -> [G, m, n]` (a weight gradient; 0 without rows)."""
    if len(bounds) == 2:
        return (left_Sm.T @ right_Sn).unsqueeze(0)
    hit = [g for g, (a, b) in enumerate(pairwise(bounds)) if a < b]
    if len(hit) < len(bounds) - 1:  # kernels differ in what they make of a sum over no rows
        output_Gmn = left_Sm.new_zeros(len(bounds) - 1, left_Sm.shape[1], right_Sn.shape[1])
        if not hit:
            return output_Gmn
        product_hmn = grouped_outer(left_Sm, right_Sn, (0, *(bounds[g + 1] for g in hit)))
        return output_Gmn.index_copy_(0, _on_device(hit, left_Sm, dtype=torch.int64), product_hmn)
    left_mS = left_Sm.T
    if _aligned(left_mS) and _aligned(right_Sn) and left_Sm.dtype == right_Sn.dtype:
        return functional.grouped_mm(left_mS, right_Sn, offs=_offsets(bounds, left_Sm))
    return torch.stack([left_Sm[a:b].T @ right_Sn[a:b] for a, b in pairwise(bounds)])


class FrozenGroupedMatmul(torch.autograd.Function):
    """`grouped_matmul` with a frozen weight that is loaded anew in backward, so no dense copy outlives the call."""

    @staticmethod
    def forward(ctx: Any, input_Sk: Tensor, load_Gkn: Callable[[], Tensor], bounds: tuple[int, ...]) -> Tensor:
        """`load_Gkn` returns the weight `[G, k, n]`, for example by dequantising it."""
        ctx.load_Gkn, ctx.bounds = load_Gkn, bounds
        return grouped_matmul(input_Sk, load_Gkn(), bounds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the input only, `[S, k]`."""
        return grouped_matmul(grads[0].contiguous(), ctx.load_Gkn().transpose(1, 2), ctx.bounds), None, None


def _aligned(tensor: Tensor) -> bool:
    """Whether grouped_mm takes this operand: a supported type, all strides 16 bytes wide but a single unit one.

    And rows or columns that do not overlap by their strides, which views of one column may do.
    """
    if not _has_grouped_kernel(tensor.device, tensor.dtype) or tensor.data_ptr() % 16:
        return False
    (rows, columns), (down, right) = tensor.shape[-2:], tensor.stride()[-2:]
    if not (right == 1 and down >= columns) and not (down == 1 and right >= rows):
        return False
    narrow = [stride for stride in tensor.stride() if stride * tensor.element_size() % 16]
    return len(narrow) <= 1 and all(stride == 1 for stride in narrow)


@cache
def _has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """On a GPU bf16 of compute capability 9 and 10; elsewhere grouped_mm is a loop that fetches the offsets anew."""
    if device.type == "cpu":
        return dtype in _GROUPED_DTYPES
    on_gpu = device.type == "cuda" and dtype == torch.bfloat16
    return on_gpu and torch.cuda.get_device_capability(device)[0] in _GROUPED_CAPABILITIES


def _offsets(bounds: tuple[int, ...], like: Tensor) -> Tensor:
    return _on_device(bounds[1:], like, dtype=torch.int32)


def _on_device(values: Sequence[int], like: Tensor, *, dtype: torch.dtype) -> Tensor:
    # A copy that does not wait for the GPU, as `torch.tensor(..., device=)` would.
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)
