"""DoraExperts: one PEFT layer for all experts of a MoE layer.

T tokens, K experts per token, S = T*K sorted pairs, E experts, C channels (sum of the widths), H hidden, r rank,
G experts of equal width.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lightning_moe.adapters.functional import adapted_norm, safe_norm, squared_norms
from lightning_moe.adapters.layer import OwnLoraLayer
from lightning_moe.adapters.norms import BaseNorms, NormCache, versions, weights_key
from lightning_moe.adapters.step import SIDES, Call, Piece, adapted_experts
from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts, DenseRows
from lightning_moe.models.grouped import Routing, expert_runs


class DoraExperts(OwnLoraLayer):
    """DoRA (or LoRA) on every expert of a `ChannelExperts`, as a few stacked fp32 parameters.

    Same forward as the experts. All parameters are in storage order (slots sorted by width), so that the experts of a
    width are one view: `lora_A_gate`, `lora_A_up` [E, r, H], `lora_B_gate`, `lora_B_up` [C, r], `lora_A_down` [C, r]
    (A transposed), `lora_B_down` [E, H, r], `lora_magnitude_gate`, `lora_magnitude_up` [C], `lora_magnitude_down`
    [E, H]. B starts at 0 and the magnitudes at the norms of the base: the start is the identity. The rank is one number
    for all experts; where an expert has fewer channels than that, its down adapter is just full rank.

    The norms of DoRA are computed once per optimizer step, however many micro-batches, recomputations under gradient
    checkpointing or generated tokens there are, and only of experts that get tokens. They follow optimizer steps,
    changes in place, loading, replacement, casts, moves and another scaling, and are forgotten at every `train()` and
    `eval()`. A write through `.data` with neither an optimizer step nor such a call before the next forward is unseen.

    Args:
        base_layer: the frozen experts, dense or packed.
        adapter_name: PEFT's name of the adapter.
        config: PEFT's config; only `use_dora` is read.
        r: rank, at least 1.
        lora_alpha: the scaling is `lora_alpha / r`.

    Raises:
        ValueError: the rank is not positive, or the activation has parameters or works in place.
    """

    adapter_layer_names = (
        *(f"lora_A_{side}" for side in SIDES),
        *(f"lora_B_{side}" for side in SIDES),
        *(f"lora_magnitude_{side}" for side in SIDES),
    )

    def __init__(
        self,
        base_layer: ChannelExperts,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name)
        _check_activation(base_layer.act_fn)
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ParameterDict())
        self._base_norms = BaseNorms()
        self._norms: dict[str, NormCache] = {}
        self.update_layer(adapter_name, r, lora_alpha, config)

    @property
    def experts(self) -> ChannelExperts:
        """The frozen experts."""
        return self.get_submodule("base_layer")  # pyright: ignore[reportReturnType]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Adds the parameters of one adapter (PEFT calls this for a second adapter on the same layer)."""
        self.note_adapter(adapter_name, rank=r, alpha=lora_alpha, config=config, what="an expert")
        for name, value in self._initial_parameters(r, use_dora=config.use_dora).items():
            self.parameters_of(name)[adapter_name] = nn.Parameter(value)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initial_parameters(self, r: int, *, use_dora: bool) -> dict[str, Tensor]:
        experts, base_sq = self.experts, self.base_sq()
        device = base_sq["gate"].device
        num_experts, num_channels, hidden = experts.num_experts, sum(experts.widths), experts.hidden_size
        width_C = torch.cat([torch.full((experts.widths[e],), experts.widths[e]) for e in experts.slot_order]).to(
            device
        )
        # PEFT's kaiming_uniform_(a=sqrt(5)) is uniform in +-1/sqrt(inputs).
        initial: dict[str, Tensor] = {}
        for side in ("gate", "up"):
            initial[f"lora_A_{side}"] = _uniform((num_experts, r, hidden), device) / math.sqrt(hidden)
            initial[f"lora_B_{side}"] = torch.zeros(num_channels, r, device=device)
        initial["lora_A_down"] = _uniform((num_channels, r), device) / width_C.sqrt().unsqueeze(1)
        initial["lora_B_down"] = torch.zeros(num_experts, hidden, r, device=device)
        if use_dora:
            initial |= {f"lora_magnitude_{side}": base_sq[side].sqrt() for side in SIDES}
        return initial

    def train(self, mode: bool = True) -> Self:
        """Sets the mode, and forgets all norms: weights may have been swapped through `.data` (weight averaging)."""
        self._base_norms = BaseNorms()
        self._norms.clear()
        return super().train(mode)

    def base_sq(self) -> Mapping[str, Tensor]:
        """Squared norms of the base's outputs in fp32 (fp64 where the base is): gate and up `[C]`, down `[E, H]`."""
        # Not `state_dict`: under FSDP2 that gives up the layer that was put together for this forward.
        key = versions(dict(self.experts.named_parameters()))
        return self._base_norms.refresh(key=key, compute=self._squared_base_norms)

    def _squared_base_norms(self) -> dict[str, Tensor]:
        experts, like = self.experts, self._like_norms()
        channels, outputs = (sum(experts.widths),), (experts.num_experts, experts.hidden_size)
        squares = {side: like.new_zeros(outputs if side == "down" else channels) for side in SIDES}
        for piece in self.pieces():
            for side in SIDES:
                piece.of(f"base_sq_{side}", squares[side]).copy_(squared_norms(self.wide_weight(piece, side)))
        return squares

    def load_weight(self, rows: slice, num_experts: int, side: str, dtype: torch.dtype) -> Tensor:
        """Frozen rows of a few experts of one width as matrices `[G, i, o]`, dequantised where they are packed."""
        storage = self.experts.projection(PROJECTIONS[SIDES.index(side)])
        rows_GnH = storage.rows(rows.start, rows.stop, dtype).detach().view(num_experts, -1, storage.shape[1])
        return rows_GnH if side == "down" else rows_GnH.transpose(1, 2)

    def wide_weight(self, piece: Piece, side: str) -> Tensor:
        """Frozen weights `[G, i, o]` of a run in fp32 (fp64 where the base is)."""
        return self.load_weight(piece.rows, len(piece.experts), side, self._like_norms().dtype)

    def _like_norms(self) -> Tensor:
        """An empty tensor of the type and on the device of the norms: fp32, or fp64 where the base is."""
        weight = next(self.experts.parameters())
        return torch.empty(0, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)

    @torch.compiler.disable(reason="runs of experts depend on the routing, and backward is written by hand")
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden [T, H], index [T, K], weights [T, K] -> [T, H]`; under autocast in its type."""
        adapter = self.adapter_in_use()
        if adapter is None:
            return self.experts(hidden_states, top_k_index, top_k_weights)
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        with torch.autocast(device, enabled=False):
            call = self._call(adapter, self.experts.slots(top_k_index), dtype)
            output_TH = adapted_experts(call, hidden_states, top_k_weights, self.adapter_parameters(adapter))
            return self.experts.add_novices(output_TH, top_k_index, top_k_weights)

    def _call(self, adapter: str, slot_TK: Tensor, dtype: torch.dtype) -> Call:
        experts = self.experts
        routing = Routing.sort(slot_TK, num_slots=experts.num_experts)
        return Call(
            routing=routing,
            slot_S=slot_TK.reshape(-1)[routing.order_S],
            pieces=list(self.pieces(routing.bounds)),
            names=tuple(self.adapter_parameters(adapter)),
            scaling=self.scaling[adapter],
            dtype=dtype,
            act_fn=experts.act_fn,
            load_Gio=lambda piece, side, dtype: self.load_weight(piece.rows, len(piece.experts), side, dtype),
            norms=self._current_norms(adapter, dtype),
            base_sq=self._base_norms.squares,
        )

    def pieces(self, bounds: Sequence[int] | None = None) -> Iterator[Piece]:
        """Runs of the experts that have pairs by `bounds` (`Routing.bounds`); by default of all that have channels."""
        experts, device = self.experts, next(self.experts.parameters()).device
        bounds = tuple(range(experts.num_experts + 1) if bounds is None else bounds)
        for group in experts.groups:
            if group.width:
                local = bounds[group.first_slot : group.first_slot + group.num_experts + 1]
                runs = expert_runs(group, local, hidden_size=experts.hidden_size, packed=experts.packed, device=device)
                yield from (Piece.of_run(group, run) for run in runs)

    def _current_norms(self, adapter: str, dtype: torch.dtype) -> NormCache:
        """The adapter's norms, emptied where A, B, s or the base may have changed."""
        base_sq, parameters = self.base_sq(), self.adapter_parameters(adapter)
        low_rank = {name: value for name, value in parameters.items() if "magnitude" not in name}
        norms = self._norms.setdefault(adapter, NormCache())
        # `training` too: Lightning puts the mode back without a call of `train()`, after it has swapped weights.
        key = (dtype, self.training, self.scaling[adapter], self._base_norms.key, weights_key(low_rank))
        norms.prepare(key=key, like=base_sq)
        return norms

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by the names in the class's description."""
        dicts = {name: self.parameters_of(name) for name in self.adapter_layer_names}
        return {name: parameters[adapter] for name, parameters in dicts.items() if adapter in parameters}

    def parameters_of(self, name: str) -> nn.ParameterDict:
        """The parameters called `name` of all adapters, by adapter."""
        return self.get_submodule(name)  # pyright: ignore[reportReturnType]

    def adapter_in_use(self) -> str | None:
        """The active adapter, or None where there is none or adapters are disabled.

        Raises:
            ValueError: several adapters are active at once.
        """
        names = [name for name in self.active_adapters if name in self.scaling]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise ValueError(
                f"Expert adapters are used one at a time, but {names} are active. Call `set_adapter(name)`."
            )
        return names[0]

    @torch.no_grad()
    def adapted_down_norm(self, adapter: str) -> Tensor:
        """`||W + s B A||` of the down projections' outputs: `[E, H]`, in storage order."""
        parameters, scaling = self.adapter_parameters(adapter), self.scaling[adapter]
        norm_EH = self._like_norms().new_zeros(self.experts.num_experts, self.experts.hidden_size)
        for piece in self.pieces():
            A_Gri, B_Gor, _ = piece.low_rank("down", parameters)
            weight_Gio = self.wide_weight(piece, "down")
            base_sq_Go = squared_norms(weight_Gio)
            norm_EH[piece.slots] = adapted_norm(torch.bmm(A_Gri, weight_Gio), A_Gri, B_Gor, base_sq_Go, scaling)
        return norm_EH

    def replace_base(self, base: ChannelExperts) -> None:
        """Sets other experts under the adapters, whose parameters have that shape already."""
        self.base_layer = base
        self._base_norms = BaseNorms()
        self._norms.clear()

    @torch.no_grad()
    def merged_experts(self, *, dtype: torch.dtype) -> ChannelExperts:
        """The experts with the active adapter merged into dequantised rows, dense in `dtype`; computed in fp32."""
        experts, adapter = self.experts, self.adapter_in_use()
        dense = ChannelExperts(
            widths=experts.widths, hidden_size=experts.hidden_size, act_fn=experts.act_fn, rows=lambda *_: nn.Identity()
        )
        for side, name in zip(SIDES, PROJECTIONS, strict=True):
            rows = experts.projection(name)
            merged = rows.rows(0, rows.shape[0], dtype) if adapter is None else self._merged_rows(adapter, side, dtype)
            setattr(dense, name, DenseRows(merged))
        dense.origin = experts.origin
        if experts.novices is not None:
            dense.set_novices(experts.novice_experts, experts.novices.detach().to(dtype))
        return dense.train(experts.training)

    @torch.no_grad()
    def merged_expert_rows(self, expert: int, side: str, *, dtype: torch.dtype) -> Tensor:
        """One expert's projection (`gate`, `up` or `down`) with the active adapter merged in, as rows `[n, H]`."""
        experts, adapter = self.experts, self.adapter_in_use()
        start, stop = experts.row_range(expert)
        if adapter is None or start == stop:
            return experts.projection(PROJECTIONS[SIDES.index(side)]).rows(start, stop, dtype)
        slot = experts.slot_order.index(expert)
        piece = Piece(
            width=stop - start,
            bounds=(0, 0),
            pairs=slice(0, 0),
            slots=slice(slot, slot + 1),
            rows=slice(start, stop),
        )
        return self._merged_piece(piece, adapter, side, dtype)

    def _merged_rows(self, adapter: str, side: str, dtype: torch.dtype) -> Tensor:
        merged_CH = self._like_norms().new_empty(sum(self.experts.widths), self.experts.hidden_size, dtype=dtype)
        for piece in self.pieces():
            merged_CH[piece.rows] = self._merged_piece(piece, adapter, side, dtype)
        return merged_CH

    def _merged_piece(self, piece: Piece, adapter: str, side: str, dtype: torch.dtype) -> Tensor:
        """Rows of a run's experts, one after the other, merged in fp32: `adapted_weight` in the layout of the rows."""
        A_Gri, B_Gor, magnitude_Go = piece.low_rank(side, self.adapter_parameters(adapter))
        weight_Gio, inputs = self.wide_weight(piece, side), 1 if side == "down" else 2
        if side == "down":
            rows_GnH, left, right = weight_Gio, A_Gri.transpose(1, 2), B_Gor.transpose(1, 2)
        else:
            rows_GnH, left, right = weight_Gio.transpose(1, 2), B_Gor, A_Gri
        rows_GnH = torch.baddbmm(
            rows_GnH, left.to(rows_GnH.dtype), right.to(rows_GnH.dtype), alpha=self.scaling[adapter]
        )
        if magnitude_Go is not None:
            norm_Go = rows_GnH.square().sum(inputs).sqrt()
            rows_GnH.mul_((magnitude_Go / safe_norm(norm_Go)).unsqueeze(inputs))
        return rows_GnH.reshape(-1, self.experts.hidden_size).to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a packed base cannot hold a merged weight exactly.

        Raises:
            ValueError: always; `lightning_moe.adapters.merge_adapters` dequantises first and is exact.
        """
        raise ValueError("Merge with `lightning_moe.adapters.merge_adapters(model, dtype=...)`: it dequantises first.")


def _uniform(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.rand(shape, device=device) * 2 - 1


def _check_activation(act_fn: nn.Module) -> None:
    """Refuses what the hand-written backward would get wrong."""
    name = type(act_fn).__name__
    if list(act_fn.parameters()):
        raise ValueError(
            f"The experts' activation {name} has parameters, which get no gradient under an adapter. "
            "Use an activation without parameters."
        )
    probe = torch.tensor([-1.0, 2.0], device="cpu")
    act_fn(probe)
    if probe.tolist() != [-1.0, 2.0]:
        raise ValueError(
            f"The experts' activation {name} overwrites its input, which backward needs. Use one with `inplace=False`."
        )
