"""DoraExperts: one PEFT layer for all experts of a MoE layer.

T tokens, K experts per token, S = T*K sorted pairs, E experts, C channels (sum of the widths), H hidden, r rank.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lightning_moe.adapters.functional import adapted_norm, adapted_weight, squared_norms
from lightning_moe.adapters.norms import NormCache, versions, weights_key
from lightning_moe.adapters.step import PER_CHANNEL, SIDES, Call, Piece, adapted_experts
from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts, DenseRows
from lightning_moe.models.grouped import Routing, WidthGroup, expert_runs


class DoraExperts(nn.Module, LoraLayer):
    """DoRA (or LoRA) on every expert of a `ChannelExperts`, as a few stacked fp32 parameters.

    Same forward as the experts. All parameters are in storage order (slots sorted by width), so that the experts of a
    width are one view: `lora_A_gate`, `lora_A_up` [E, r, H], `lora_B_gate`, `lora_B_up` [C, r], `lora_A_down` [C, r]
    (A transposed), `lora_B_down` [E, H, r], `lora_magnitude_gate`, `lora_magnitude_up` [C], `lora_magnitude_down`
    [E, H]. B starts at 0 and the magnitudes at the norms of the base: the start is the identity. The rank is one number
    for all experts; where an expert has fewer channels than that, its down adapter is just full rank.

    The norms of DoRA are computed once per optimizer step, however many micro-batches, recomputations under gradient
    checkpointing or generated tokens there are, and only of experts that get tokens. They follow optimizer steps,
    changes in place, loading, replacement, and a switch between `train()` and `eval()`; a write through `.data` between
    two forwards without any of these is not seen.

    Args:
        base_layer: the frozen experts, dense or packed.
        adapter_name: PEFT's name of the adapter.
        config: PEFT's config; only `use_dora` is read.
        r: rank, at least 1.
        lora_alpha: the scaling is `lora_alpha / r`.

    Raises:
        ValueError: the rank is not positive.
    """

    adapter_layer_names = (
        *(f"lora_A_{side}" for side in SIDES),
        *(f"lora_B_{side}" for side in SIDES),
        *(f"lora_magnitude_{side}" for side in SIDES),
    )
    other_param_names = ("r", "lora_alpha", "scaling", "use_dora")

    def __init__(
        self,
        base_layer: ChannelExperts,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ParameterDict())
        for side in SIDES:
            self.register_buffer(f"base_sq_{side}", None, persistent=False)
        self._base_key: object = None
        self._norms: dict[str, NormCache] = {}
        self.update_layer(adapter_name, r, lora_alpha, config)

    @property
    def experts(self) -> ChannelExperts:
        """The frozen experts."""
        return self.get_submodule("base_layer")  # pyright: ignore[reportReturnType]

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Adds the parameters of one adapter (PEFT calls this for a second adapter on the same layer)."""
        if r <= 0:
            raise ValueError(f"The rank of an expert adapter must be at least 1, got {r}.")
        self.r[adapter_name], self.lora_alpha[adapter_name], self.scaling[adapter_name] = r, lora_alpha, lora_alpha / r
        self.use_dora[adapter_name] = config.use_dora
        for name, value in self._initial_parameters(r, use_dora=config.use_dora).items():
            self._parameter_dict(name)[adapter_name] = nn.Parameter(value)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initial_parameters(self, r: int, *, use_dora: bool) -> dict[str, Tensor]:
        self._refresh_base_norms()
        experts, device = self.experts, self.base_sq("gate").device
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
            initial |= {f"lora_magnitude_{side}": self.base_sq(side).sqrt() for side in SIDES}
        return initial

    def base_sq(self, side: str) -> Tensor:
        """Squared norms of the base's outputs in fp32: `[C]` for gate and up, `[E, H]` for down."""
        return self.get_buffer(f"base_sq_{side}")

    def _refresh_base_norms(self) -> None:
        """Computes the squared norms, width by width, where the base has changed since (loaded, replaced, cast)."""
        key = versions(self.experts.state_dict(keep_vars=True))
        if key == self._base_key:
            return
        for side in SIDES:
            norms = [squared_norms(self.group_weight(group, side)) for group in self.experts.groups]
            joined = torch.cat([norm if side == "down" else norm.reshape(-1) for norm in norms])
            setattr(self, f"base_sq_{side}", joined)
        self._base_key = key

    def load_weight(self, rows: slice, num_experts: int, side: str, dtype: torch.dtype) -> Tensor:
        """Frozen rows of a few experts of one width as matrices `[G, i, o]`, dequantised where they are packed."""
        storage = self.experts.projection(PROJECTIONS[SIDES.index(side)])
        rows_GnH = storage.rows(rows.start, rows.stop, dtype).detach().view(num_experts, -1, storage.shape[1])
        return rows_GnH if side == "down" else rows_GnH.transpose(1, 2)

    def group_weight(self, group: WidthGroup, side: str) -> Tensor:
        """`load_weight` of all experts of a width, in fp32 (fp64 where the base is)."""
        dtype = torch.promote_types(next(self.experts.parameters()).dtype, torch.float32)
        return self.load_weight(slice(group.first_row, group.last_row), group.num_experts, side, dtype)

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
            return adapted_experts(call, hidden_states, top_k_weights, self.adapter_parameters(adapter))

    def _call(self, adapter: str, slot_TK: Tensor, dtype: torch.dtype) -> Call:
        experts = self.experts
        routing = Routing.sort(slot_TK, num_slots=experts.num_experts)
        return Call(
            routing=routing,
            slot_S=slot_TK.reshape(-1)[routing.order_S],
            pieces=list(self._pieces(routing.bounds, slot_TK.device)),
            names=tuple(self.adapter_parameters(adapter)),
            scaling=self.scaling[adapter],
            dtype=dtype,
            act_fn=experts.act_fn,
            load_Gio=lambda piece, side, dtype: self.load_weight(piece.rows, len(piece.experts), side, dtype),
            norms=self._current_norms(adapter, dtype),
            base_sq={side: self.base_sq(side) for side in SIDES},
        )

    def _pieces(self, bounds: tuple[int, ...], device: torch.device) -> Iterator[Piece]:
        experts = self.experts
        for group in experts.groups:
            if group.width:
                local = bounds[group.first_slot : group.first_slot + group.num_experts + 1]
                runs = expert_runs(group, local, hidden_size=experts.hidden_size, packed=experts.packed, device=device)
                yield from (Piece.of_run(group, run) for run in runs)

    def _current_norms(self, adapter: str, dtype: torch.dtype) -> NormCache:
        """The adapter's norms, emptied where A, B or the base may have changed."""
        self._refresh_base_norms()
        parameters = self.adapter_parameters(adapter)
        low_rank = {name: value for name, value in parameters.items() if "magnitude" not in name}
        norms = self._norms.setdefault(adapter, NormCache())
        key = (dtype, self.training, self._base_key, weights_key(low_rank))
        norms.prepare(key=key, like={side: self.base_sq(side) for side in SIDES})
        return norms

    def group_parameters(self, adapter: str) -> Iterator[tuple[WidthGroup, dict[str, Tensor]]]:
        """Each width with its parts of every parameter: A `[G, r, i]`, B `[G, o, r]`, magnitudes and norms `[G, o]`.

        One split per parameter: its backward is one concatenation, whatever the number of widths.
        """
        groups = self.experts.groups
        parts = {name: self._split(name, value) for name, value in self._tensors(adapter).items()}
        for index, group in enumerate(groups):
            tensors = {}
            for name, pieces in parts.items():
                piece = pieces[index]
                if name in PER_CHANNEL:
                    piece = piece.unflatten(0, (group.num_experts, group.width))
                tensors[name] = piece.transpose(1, 2) if name == "lora_A_down" else piece
            yield group, tensors

    def _split(self, name: str, value: Tensor) -> tuple[Tensor, ...]:
        groups = self.experts.groups
        sizes = [g.num_experts * g.width if name in PER_CHANNEL else g.num_experts for g in groups]
        return value.split(sizes)

    def _tensors(self, adapter: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(self.adapter_parameters(adapter))
        if self.use_dora[adapter]:
            tensors |= {f"base_sq_{side}": self.base_sq(side) for side in SIDES}
        return tensors

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by the names in the class's description."""
        dicts = {name: self._parameter_dict(name) for name in self.adapter_layer_names}
        return {name: parameters[adapter] for name, parameters in dicts.items() if adapter in parameters}

    def _parameter_dict(self, name: str) -> nn.ParameterDict:
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
        norms = []
        for group, tensors in self.group_parameters(adapter):
            weight_Gio = self.group_weight(group, "down")
            A, B = tensors["lora_A_down"], tensors["lora_B_down"]
            base_sq = squared_norms(weight_Gio)
            norms.append(adapted_norm(torch.bmm(A, weight_Gio), A, B, base_sq, self.scaling[adapter]))
        return torch.cat(norms)

    def rebuilt(self, base: ChannelExperts, adapter: str) -> "DoraExperts":
        """A fresh layer around another base with an adapter of the same name, rank, scaling and trainability."""
        trainable = any(parameter.requires_grad for parameter in self.adapter_parameters(adapter).values())
        config = LoraConfig(use_dora=self.use_dora[adapter], inference_mode=not trainable)
        fresh = DoraExperts(base, adapter, config, r=self.r[adapter], lora_alpha=self.lora_alpha[adapter])
        return fresh.train(self.training)

    def merged_experts(self, *, dtype: torch.dtype) -> ChannelExperts:
        """The experts with the active adapter merged into dequantised rows, dense in `dtype`; computed in fp32."""
        experts, adapter = self.experts, self.adapter_in_use()
        merged: dict[str, list[Tensor]] = {side: [] for side in SIDES}
        for group, tensors in self.group_parameters(adapter) if adapter is not None else ():
            for side in SIDES:
                A, B, m = tensors[f"lora_A_{side}"], tensors[f"lora_B_{side}"], tensors.get(f"lora_magnitude_{side}")
                weight_Goi = self.group_weight(group, side).transpose(1, 2)
                weight_Goi = adapted_weight(weight_Goi, A, B, m, self.scaling[adapter or ""]).detach().to(dtype)
                rows_GnH = weight_Goi.transpose(1, 2) if side == "down" else weight_Goi
                merged[side].append(rows_GnH.reshape(-1, experts.hidden_size))
        dense = ChannelExperts(
            widths=experts.widths, hidden_size=experts.hidden_size, act_fn=experts.act_fn, rows=lambda *_: nn.Identity()
        )
        for side, name in zip(SIDES, PROJECTIONS, strict=True):
            rows = experts.projection(name)
            weight = torch.cat(merged[side]) if adapter is not None else rows.rows(0, rows.shape[0], dtype).detach()
            setattr(dense, name, DenseRows(weight))
        return dense.train(experts.training)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a packed base cannot hold a merged weight exactly.

        Raises:
            ValueError: always; `lightning_moe.adapters.merge_adapters` dequantises first and is exact.
        """
        raise ValueError("Merge with `lightning_moe.adapters.merge_adapters(model, dtype=...)`: it dequantises first.")


def _uniform(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.rand(shape, device=device) * 2 - 1
