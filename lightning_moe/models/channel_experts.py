"""ChannelExperts: the experts of one layer as rows, each expert with its own number of channels.

T tokens, H hidden, K experts per token, S = T*K routed pairs, E experts, C = sum of widths, G experts of equal width,
N novices.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from lightning_moe.models.grouped import (
    ExpertRun,
    FrozenGroupedMatmul,
    Routing,
    RowLoader,
    WidthGroup,
    expert_runs,
    grouped_matmul,
    width_groups,
)
from lightning_moe.models.traced import new_ticket, traced_output, traces_for_inference

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class RowStorage(nn.Module, ABC):
    """How the rows of one projection are stored."""

    packed: ClassVar[bool]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(channels, hidden)."""

    @abstractmethod
    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows `start:stop` as `[n, H]` of type `dtype`."""

    @abstractmethod
    def blocks(self, sizes: Sequence[int]) -> list[RowLoader]:
        """One loader for each of the consecutive blocks of `sizes` rows; a loader counts from its block's first row."""

    @abstractmethod
    def select(self, index_C: Tensor) -> Self:
        """New storage with the rows of `index_C`, in that order."""


class DenseRows(RowStorage):
    """Rows in a floating-point type: one parameter `weight [C, H]`."""

    packed = False

    def __init__(self, weight_CH: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_CH)

    @property
    def shape(self) -> tuple[int, int]:
        """(channels, hidden)."""
        return self.weight.shape[0], self.weight.shape[1]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows `start:stop` as `[n, H]`: a view where the type is already `dtype`."""
        return self.weight[start:stop].to(dtype)

    def blocks(self, sizes: Sequence[int]) -> list[RowLoader]:
        """Views from one `split`: backward fills one gradient, where slices would each make one of all C rows."""
        return [partial(_block_rows, block_nH) for block_nH in self.weight.split(list(sizes))]

    def select(self, index_C: Tensor) -> "DenseRows":
        """A new module with the rows of `index_C`, in that order."""
        selected = DenseRows(self.weight.detach().index_select(0, index_C))
        selected.weight.requires_grad_(self.weight.requires_grad)
        return selected


def _block_rows(block_nH: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    return (block_nH if (start, stop) == (0, len(block_nH)) else block_nH[start:stop]).to(dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """Which channels of the layer as it was loaded are still there: what a checkpoint says to rebuild a cut model.

    Args:
        widths: channels of each expert of the layer as it was loaded, in its router's order.
        kept_C: boolean, those channels expert by expert: still here.
        refitted: the down rows were fitted anew since, so that the loaded rows do not give them.
        replaced: experts were replaced by constants since, which the loaded rows do not give.

    Raises:
        ValueError: a value of the wrong kind, or a mask of another length.
    """

    widths: tuple[int, ...]
    kept_C: Tensor
    refitted: bool = False
    replaced: bool = False

    def __post_init__(self) -> None:
        counts = [width for width in self.widths if isinstance(width, int) and width >= 0]
        if len(counts) < len(self.widths) or not isinstance(self.refitted, bool):
            raise ValueError(
                f"`widths` must be counts >= 0 and `refitted` a truth value, got {self.widths!r} and {self.refitted!r}."
            )
        if self.kept_C.dtype != torch.bool or tuple(self.kept_C.shape) != (sum(counts),):
            raise ValueError(
                f"`kept_C` must be bool of shape ({sum(counts)},), got {self.kept_C.dtype} of shape "
                f"{tuple(self.kept_C.shape)}."
            )

    @classmethod
    def whole(cls, widths: Sequence[int]) -> Self:
        """Nothing was cut."""
        return cls(widths=tuple(widths), kept_C=torch.ones(sum(widths), dtype=torch.bool, device="cpu"))

    def cut(self, keep_C: Tensor) -> "Origin":
        """After a cut that keeps these of the channels that are here now, in the same order."""
        kept_C = self.kept_C.clone()
        kept_C[self.kept_C] = keep_C.to(kept_C.device)
        return replace(self, kept_C=kept_C)


class ChannelExperts(nn.Module):
    """Gated experts of unequal width with the experts signature of transformers 5.

    Channel c of an expert is one row of `gate_proj`, of `up_proj` and of `down_proj` (stored transposed), so that
    pruning is row selection. Experts are stored sorted by width; experts of equal width are one `[G, n, H]` view and
    one grouped matrix product, or a few (`expert_runs`). Width 0 marks an expert that a masked router still counts but
    never chooses, or a novice: an expert whose output is a constant (`set_novices`).

    Args:
        widths: channels of each expert, in the router's order.
        hidden_size: H.
        act_fn: activation of the gate projection: `h = act_fn(gate) * up`.
        rows: builds the storage of one projection; called three times. Dense and uninitialised by default.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        hidden_size: int,
        act_fn: nn.Module,
        rows: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.widths = tuple(int(width) for width in widths)
        self.origin = Origin.whole(self.widths)
        self.hidden_size = hidden_size
        self.act_fn = act_fn
        self.slot_order = tuple(sorted(range(len(self.widths)), key=lambda e: (self.widths[e], e)))
        sorted_widths = [self.widths[e] for e in self.slot_order]
        self.groups = tuple(width_groups(sorted_widths))
        starts = dict(zip(self.slot_order, accumulate(sorted_widths[:-1], initial=0), strict=True))
        self._first_row = tuple(starts[e] for e in range(len(self.widths)))
        build = rows or (lambda num_rows, hidden: DenseRows(torch.empty(num_rows, hidden)))
        for projection in PROJECTIONS:
            self.add_module(projection, build(sum(self.widths), hidden_size))
        self.novice_experts: tuple[int, ...] = ()
        self.register_parameter("novices", None)
        self._slot_of_expert: dict[torch.device, Tensor] = {}
        self._ticket = new_ticket(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what comes out of a file, is another module: compiled graphs must not run the first one for it."""
        super().__setstate__(state)
        self._ticket = new_ticket(self)

    @property
    def num_experts(self) -> int:
        """Experts the router may name, width-0 ones included."""
        return len(self.widths)

    @property
    def packed(self) -> bool:
        """Whether the rows are stored in 4 bit."""
        return self.projection("gate_proj").packed

    def projection(self, name: str) -> RowStorage:
        """The row storage called `name` (see PROJECTIONS)."""
        return cast(RowStorage, self.get_submodule(name))

    def set_novices(self, experts: Sequence[int], rows_NH: Tensor) -> None:
        """Makes experts of width 0 novices: their output is a row of `rows_NH`, a frozen parameter, for every token.

        Args:
            experts: positions in the router's order, ascending.
            rows_NH: their outputs, before the gate weight.
        """
        assert all(self.widths[expert] == 0 for expert in experts)
        assert rows_NH.shape == (len(experts), self.hidden_size)
        self.novice_experts = tuple(experts)
        self.novices = nn.Parameter(rows_NH, requires_grad=False) if experts else None

    def add_novices(self, output_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The routed sum `[T, H]` of the other experts and, where there are novices, gate weight times constant."""
        if self.novices is None:
            return output_TH
        gate_TE = weights_TK.new_zeros(len(index_TK), self.num_experts).scatter_add(1, index_TK, weights_TK)
        constant_TH = gate_TE[:, list(self.novice_experts)] @ self.novices.to(gate_TE.dtype)
        return output_TH + constant_TH.to(output_TH.dtype)

    def slots(self, index_TK: Tensor) -> Tensor:
        """Storage slot of each expert index `[T, K]` (a lookup of E entries)."""
        device = index_TK.device
        if device not in self._slot_of_expert:
            slot_E = torch.empty(self.num_experts, dtype=torch.int64)
            slot_E[list(self.slot_order)] = torch.arange(self.num_experts)
            self._slot_of_expert[device] = slot_E.to(device)
        return self._slot_of_expert[device][index_TK]

    def row_range(self, expert: int) -> tuple[int, int]:
        """First row and one past the last row of an expert of the router's order."""
        return self._first_row[expert], self._first_row[expert] + self.widths[expert]

    def expert_matrices(self, expert: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and transposed down projection of one expert, each `[n, H]`."""
        start, stop = self.row_range(expert)
        gate_nH, up_nH, down_nH = (self.projection(name).rows(start, stop, dtype) for name in PROJECTIONS)
        return gate_nH, up_nH, down_nH

    def storage_order(self) -> Tensor:
        """Row of each channel when channels are counted expert by expert in the router's order: int64 `[C]`."""
        return torch.cat([torch.arange(*self.row_range(e)) for e in range(self.num_experts)])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden [T, H], index [T, K], weights [T, K] -> [T, H]`, in the autocast type where autocast is on.

        Without autograd this is one operator of a compiled graph; with autograd the graph breaks around it.
        """
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        # Cast here, not product by product: a backward that loads weights anew runs outside autocast.
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_states.dtype
        input_TH = hidden_states.to(dtype)
        if traces_for_inference():
            return traced_output(input_TH, top_k_index, top_k_weights, hidden_states.dtype, self._ticket)
        return self._untraced_output(input_TH, top_k_index, top_k_weights, hidden_states.dtype)

    @torch.compiler.disable(
        reason="the number of tokens of each expert is data: with autograd the experts run outside the graph"
    )
    def _untraced_output(self, input_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
        return self.routed_output(input_TH, index_TK, weights_TK, dtype)

    def routed_output(self, input_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """`forward` `[T, H]`, computed in the type of the input, given as `dtype`.

        One host sync a layer (`Routing.bounds`), none per expert.
        """
        routing = Routing.sort(self.slots(index_TK), num_slots=self.num_experts)
        if input_TH.device.type == "cpu" and not self._needs_autograd(input_TH, weights_TK):
            output_TH = self._accumulated_output(input_TH, routing, weights_TK)
        else:
            output_TH = routing.combine(self._sorted_output(input_TH[routing.token_S], routing), weights_TK)
        return self.add_novices(output_TH, index_TK, weights_TK).to(dtype)

    def _needs_autograd(self, *inputs: Tensor) -> bool:
        tensors = chain(inputs, self.parameters())
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def _accumulated_output(self, input_TH: Tensor, routing: Routing, weights_TK: Tensor) -> Tensor:
        """Run by run from gather to weighted sum, so that all between stays in the cache: `[T, H] -> [T, H]`.

        The sums are fp32 (or wider) and in the order of the slots; a GPU would need atomic adds for this.
        """
        weights_S1 = weights_TK.reshape(-1)[routing.order_S].unsqueeze(1)
        sum_TH = input_TH.new_zeros(input_TH.shape, dtype=torch.promote_types(input_TH.dtype, torch.float32))
        for run, loaders in self._runs(routing, input_TH.device):
            token_S = routing.token_S[run.start : run.stop]
            output_SH = self._run_output(run, loaders, input_TH.index_select(0, token_S))
            weighted_SH = output_SH * weights_S1[run.start : run.stop]
            sum_TH.index_add_(0, token_S, weighted_SH.to(sum_TH.dtype))
        return sum_TH

    def _sorted_output(self, input_SH: Tensor, routing: Routing) -> Tensor:
        """Output of each routed pair, sorted by slot: `[S, H] -> [S, H]`."""
        # Experts of width 0 come first and add nothing.
        pieces = [torch.zeros_like(input_SH[: routing.bounds[self.widths.count(0)]])]
        for run, loaders in self._runs(routing, input_SH.device):
            pieces.append(self._run_output(run, loaders, input_SH[run.start : run.stop]))
        return torch.cat(pieces)

    def _runs(self, routing: Routing, device: torch.device) -> Iterator[tuple[ExpertRun, tuple[RowLoader, ...]]]:
        """What to compute in one grouped product, in the order of the pairs, and where its rows come from."""
        sizes = [group.num_rows for group in self.groups]
        loaders = zip(*(self.projection(name).blocks(sizes) for name in PROJECTIONS), strict=True)
        for group, loaders_of_group in zip(self.groups, loaders, strict=True):
            bounds = routing.bounds[group.first_slot : group.first_slot + group.num_experts + 1]
            if group.width and bounds[0] < bounds[-1]:
                for run in self._split(group, bounds, device):
                    yield run, loaders_of_group

    def _split(self, group: WidthGroup, bounds: tuple[int, ...], device: torch.device) -> list[ExpertRun]:
        if torch.is_grad_enabled() and not self.packed:
            # The gradient of a part of a block would be as large as the block.
            return [ExpertRun.cut(group, bounds, first=0, last=group.num_experts)]
        return expert_runs(group, bounds, hidden_size=self.hidden_size, packed=self.packed, device=device)

    def _run_output(self, run: ExpertRun, loaders: tuple[RowLoader, ...], input_SH: Tensor) -> Tensor:
        """Output of the experts of a run on their own tokens: `[S, H] -> [S, H]`."""
        load_gate, load_up, load_down = loaders
        gate_Sn = self._matmul(load_gate, run, input_SH, transpose=True)
        up_Sn = self._matmul(load_up, run, input_SH, transpose=True)
        return self._matmul(load_down, run, self.act_fn(gate_Sn) * up_Sn, transpose=False)

    def _matmul(self, loader: RowLoader, run: ExpertRun, input_Sk: Tensor, *, transpose: bool) -> Tensor:
        """Grouped product with the rows of a run of experts; packed rows are not kept for backward."""

        def load() -> Tensor:
            weight_GnH = run.load(loader, input_Sk.dtype)
            return weight_GnH.transpose(1, 2) if transpose else weight_GnH

        if torch.is_grad_enabled() and input_Sk.requires_grad and self.packed:
            return cast(Tensor, FrozenGroupedMatmul.apply(input_Sk, load, run.bounds))
        return grouped_matmul(input_Sk, load(), run.bounds)

    def extra_repr(self) -> str:
        """Experts, channels and the widths in use."""
        distinct = sorted(set(self.widths))
        return f"num_experts={self.num_experts}, channels={sum(self.widths)}, distinct widths={distinct}"
