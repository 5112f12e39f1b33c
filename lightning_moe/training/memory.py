"""What a recovery run holds in memory, from a config alone: counted on tensors without data.

Per micro-batch T tokens, S = T * K routed pairs, H hidden, V vocabulary, C channels of a layer, n of an expert, r rank.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightning_moe.adapters.groups import trainable_groups
from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.allocation.units import format_bytes
from lightning_moe.models.channel_experts import ChannelExperts, DenseRows
from lightning_moe.models.discovery import expert_widths, layer_shape, moe_layers
from lightning_moe.models.grouped import run_bytes
from lightning_moe.quantization.size import sizes_of
from lightning_moe.training.losses import CHUNK_NUMBERS
from lightning_moe.training.optim import OptimizerName, check_optimizer
from lightning_moe.training.saved_activations import layer_activations

# bitsandbytes: smaller tensors keep 32-bit moments, larger ones have a fp32 scale per block; a table for each moment.
_MIN_8BIT, _BLOCK_8BIT, _TABLE_8BIT = 4096, 256, 256
_LOSS_TENSORS = 4  # of CHUNK_NUMBERS: logits in fp32, their softmax, its gradient, one that comes and goes
_HIDDEN_TENSORS = 4  # [T, H] in fp32: gradients of the output and of the input, the layer's input, the sum of pairs
_PAIR_BYTES = 14  # a number of [pairs of a run, H] in backward: two fp32, two in the type of the products, one copy
_LARGEST = 2**24  # tokens of a sequence, sequences of a batch
_DRIVER_BYTES = {"cuda": 800 * 10**6, "cpu": 0}  # context and kernels of a GPU: assumed, not counted


@dataclass(frozen=True, kw_only=True)
class RecoveryRun:
    """What decides the memory of a step, besides the model and its adapters.

    Args:
        sequence_length: Tokens of a sequence.
        batch_size: Sequences of a micro-batch.
        optimizer: As `RecoveryModule` has it.
        gradient_checkpointing: Recompute each decoder layer in backward.
        device: `cuda` or `cpu`: how many experts are worked on at once.

    Raises:
        ValueError: a number below 1, or an unknown optimizer.
    """

    sequence_length: int = 1024
    batch_size: int = 1
    optimizer: OptimizerName = "paged_adamw8bit"
    gradient_checkpointing: bool = True
    device: str = "cuda"

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)
        for name in ("sequence_length", "batch_size"):
            if not 1 <= getattr(self, name) <= _LARGEST:
                raise ValueError(f"`{name}` must be a whole number from 1 to {_LARGEST:,}, got {getattr(self, name)}.")

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.sequence_length * self.batch_size


@dataclass(frozen=True, kw_only=True)
class MemoryTable:
    """Bytes, part by part, at the step's peak.

    Args:
        base: The frozen model as it is packed.
        norms: Norms of the base and of the adapted weights, which DoRA keeps.
        adapters: Trainable parameters, fp32.
        gradients: Of the same size.
        optimizer: Its state (a paged one may leave the GPU).
        activations: What forward keeps for backward: the input of every decoder layer, or everything in them.
        working: The larger of one decoder layer in backward, with its gradients once more (they are added to those of
            the micro-batches before), and logits with their gradient in the loss.
        driver: Context and kernels of a GPU, an assumption.
    """

    base: int
    norms: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    driver: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Adapters and what a run with them takes."""

    adapter: AdapterConfig
    table: MemoryTable


@dataclass(frozen=True, kw_only=True, eq=False)
class RecoveryMemory:
    """Memory of recovery runs of one model.

    Args:
        config: Of a known family, not cut.
        width: Channels that every expert keeps.
        dtype: Type of what is not packed, of activations and of matrix products.
        packed: Whether the base is in NF4.
        run: Of which kind.
    """

    config: PretrainedConfig
    width: int
    dtype: torch.dtype
    packed: bool = True
    run: RecoveryRun = field(default_factory=RecoveryRun)

    def adapted(self, adapter: AdapterConfig) -> PreTrainedModel:
        """The cut model on the meta device, with the adapters that `inject_adapters` makes."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(deepcopy(self.config), dtype=self.dtype)
            for layer in moe_layers(model):
                model.set_submodule(layer.name, self._experts(layer.experts))
            model.requires_grad_(False)
            inject_adapters(model, config=adapter)
        return model

    def _experts(self, stock: nn.Module) -> ChannelExperts:
        return ChannelExperts(
            widths=[self.width] * len(expert_widths(stock)),
            hidden_size=self._hidden,
            act_fn=stock.act_fn,  # pyright: ignore[reportArgumentType]
            rows=lambda num_rows, hidden: DenseRows(torch.empty(num_rows, hidden, dtype=self.dtype)),
        )

    def table(self, adapter: AdapterConfig) -> MemoryTable:
        """Counts a run with these adapters.

        Raises:
            ValueError: the adapters do not fit the model (see `AdapterConfig`), or 4 bit its hidden size.
        """
        model = self.adapted(adapter)
        trained = [parameter for group in trainable_groups(model).values() for parameter in group]
        adapters = sum(parameter.numel() * parameter.itemsize for parameter in trained)
        return MemoryTable(
            base=self.base,
            norms=self._norms(adapter),
            adapters=adapters,
            gradients=adapters,
            optimizer=optimizer_bytes([parameter.numel() for parameter in trained], name=self.run.optimizer),
            activations=self._activations(adapter),
            working=max(self._layer(adapter, adapters // self._num_adapted(adapter)), self._logits),
            driver=_DRIVER_BYTES[self.run.device],
        )

    @cached_property
    def base(self) -> int:
        """Bytes of the frozen tensors."""
        sizes = sizes_of(self.config, bits=4 if self.packed else 16, dtype=self.dtype)
        tensors = sizes.tensors([[self.width] * len(layer.widths) for layer in sizes.layers])
        return sum(tensor.num_bytes for tensor in tensors if ".quant_state." not in tensor.name)

    @cached_property
    def _shape(self) -> tuple[int, int, int]:
        """MoE layers, experts of a layer, experts per token."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(deepcopy(self.config), dtype=self.dtype)
        layers = [layer_shape(layer) for layer in moe_layers(model)]
        return len(layers), layers[0].num_experts, layers[0].top_k

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self._shape[0]

    @property
    def _hidden(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    def _num_adapted(self, adapter: AdapterConfig) -> int:
        return self.num_layers if adapter.layers is None else len(set(adapter.layers))

    def _norms(self, adapter: AdapterConfig) -> int:
        """Of the base and adapted: gate `[C]`, up `[C]`, down `[E, H]`, fp32."""
        if not adapter.use_dora or not adapter.expert_rank:
            return 0
        num_experts = self._shape[1]
        return 2 * self._num_adapted(adapter) * num_experts * (2 * self.width + self._hidden) * 4

    @cached_property
    def _around(self) -> int:
        """What a MoE layer keeps outside its routed experts, without adapters on the attention."""
        model = self.adapted(AdapterConfig(expert_rank=1, router_rank=1))
        return layer_activations(model, batch_size=self.run.batch_size, sequence_length=self.run.sequence_length)

    def _experts_kept(self, adapter: AdapterConfig) -> int:
        """Outputs of the three projections `[S, n]`, `[S, n]`, `[S, H]`, and `x A^T` of each."""
        num_pairs = self.run.num_tokens * self._shape[2]
        numbers = 2 * self.width + self._hidden + 3 * adapter.expert_rank
        return num_pairs * numbers * self.dtype.itemsize

    def _activations(self, adapter: AdapterConfig) -> int:
        if self.run.gradient_checkpointing:
            num_decoders = int(self.config.get_text_config().num_hidden_layers)
            return num_decoders * self.run.num_tokens * self._hidden * self.dtype.itemsize
        return self._num_adapted(adapter) * (self._around + self._experts_kept(adapter))

    def _layer(self, adapter: AdapterConfig, gradients: int) -> int:
        """One decoder layer in backward."""
        again = self._around + self._experts_kept(adapter) if self.run.gradient_checkpointing else 0
        hidden = _HIDDEN_TENSORS * self.run.num_tokens * self._hidden * 4
        num_experts, rows = self._shape[1], 4 * self.width * self._hidden
        at_once = min(num_experts, max(1, run_bytes(self.run.device) // rows))
        pairs = self.run.num_tokens * self._shape[2] * at_once // num_experts
        weights = at_once * rows * self.dtype.itemsize // 4
        return again + hidden + gradients + weights + pairs * self._hidden * _PAIR_BYTES

    @property
    def _logits(self) -> int:
        """Logits and their gradient `[T, V]`, and the chunks of the loss."""
        numbers = self.run.num_tokens * int(self.config.get_text_config().vocab_size)
        return 2 * numbers * self.dtype.itemsize + 4 * _LOSS_TENSORS * min(CHUNK_NUMBERS, numbers)

    def search(self, num_bytes: int, *, ranks: Sequence[int], adapter: AdapterConfig) -> list[Attempt]:
        """The largest rank that fits with all layers; else the smallest rank with the most top layers that fit.

        Args:
            num_bytes: Memory of the device.
            ranks: Of the experts, the preferred one first.
            adapter: Everything but `expert_rank` and `layers`.

        Returns:
            What was tried: ranks with all layers until one fits; where none does, also the smallest on as many top
            layers as fit. The last one is the answer.

        Raises:
            ValueError: not even the smallest rank on the topmost layer fits, with what it takes.
        """
        tried: list[Attempt] = []
        for rank in ranks:
            tried.append(self._attempt(replace(adapter, expert_rank=rank)))
            if tried[-1].table.total <= num_bytes:
                return tried
        fits, too_many = 0, self.num_layers
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            enough = self._top(middle, tried[-1].adapter).table.total <= num_bytes
            fits, too_many = (middle, too_many) if enough else (fits, middle)
        last = self._top(max(fits, 1), tried[-1].adapter)
        if last.table.total > num_bytes:
            raise ValueError(
                f"No recovery run fits {format_bytes(num_bytes)}: expert rank {ranks[-1]} on the topmost MoE layer "
                f"alone takes {format_bytes(last.table.total)}, {format_bytes(last.table.base)} of it the frozen "
                "model. Prune more, make `sequence_length` or `batch_size` smaller, or allow that."
            )
        return [*tried, last]

    def _attempt(self, adapter: AdapterConfig) -> Attempt:
        return Attempt(adapter=adapter, table=self.table(adapter))

    def _top(self, count: int, adapter: AdapterConfig) -> Attempt:
        """Adapters on the last `count` MoE layers."""
        return self._attempt(replace(adapter, layers=tuple(range(self.num_layers - count, self.num_layers))))


def optimizer_bytes(numels: Sequence[int], *, name: OptimizerName) -> int:
    """Bytes of the state over tensors of so many numbers.

    `adamw`: two fp32 moments and a step count. The 8-bit ones: two moments of a byte with a fp32 scale for 256 numbers,
    tensors below 4,096 numbers as in fp32; two tables of 256 numbers.
    """
    check_optimizer(name)
    if name == "adamw":
        return sum(8 * numel + 4 for numel in numels)
    small = sum(8 * numel for numel in numels if numel < _MIN_8BIT)
    large = sum(2 * (numel + 4 * -(-numel // _BLOCK_8BIT)) for numel in numels if numel >= _MIN_8BIT)
    return small + large + (2 * 4 * _TABLE_8BIT if large else 0)
