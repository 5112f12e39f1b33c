"""Second pass: Gram matrices of every expert's channels, for the least-squares repair (method, sections 1 and 5).

T tokens, K experts per token, S = T*K routed pairs sorted by expert, E experts, n channels of an expert, m columns of
a Gram, H hidden.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.calibration.collector import Batch, TextReader
from lightning_moe.calibration.observer import LayerObserver, evaluating, observed
from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.calibration.routed import ExpertPass, RoutedPairs, expert_passes, inverse_energy, sum_dtype
from lightning_moe.models.discovery import MoeLayer, expert_widths, moe_layers
from lightning_moe.models.products import product

log = logging.getLogger(__name__)

# Token classes: two halves of the stream, padding last.
_NUM_HALVES, _PADDING = 2, 2
_GB = 2**30


class GramColumns(ABC):
    """What the columns of the Grams are."""

    @abstractmethod
    def count(self, layer: MoeLayer, expert: int) -> int:
        """Number of columns of an expert: m."""

    @abstractmethod
    def values(self, layer: MoeLayer, one: ExpertPass) -> Tensor:
        """The columns on an expert's counted pairs, `[S, m]`."""


class HiddenChannels(GramColumns):
    """The expert's own channels: m = n."""

    def count(self, layer: MoeLayer, expert: int) -> int:
        """Number of channels."""
        return expert_widths(layer.experts)[expert]

    def values(self, layer: MoeLayer, one: ExpertPass) -> Tensor:
        """`h = act(a) * u`, `[S, n]`."""
        return one.hidden_Sn


HIDDEN_CHANNELS = HiddenChannels()


@dataclass(frozen=True, kw_only=True)
class LayerGram:
    """`sum g^2 q h h^T` over the pairs routed to each expert, separately for two halves of the tokens.

    `h` are its channels, or other columns (`GramColumns`). Half A is every second token of each row of text (padding
    left out), half B the others, so that the halves depend neither on how rows are batched nor on which process runs
    them. `q` holds the family's residual multiplier, so that `tr(D^T G D)` is a relative squared error of the layer's
    output, summed over tokens.

    Args:
        layer_index: position among the MoE layers.
        half_a: per expert `[m, m]` in fp32 (float64 for a float64 model); `[0, 0]` for an expert not asked for.
        half_b: the same over the other tokens.
        counts: routed tokens of each expert, both halves together.
        num_tokens: tokens that count.
    """

    layer_index: int
    half_a: tuple[Tensor, ...]
    half_b: tuple[Tensor, ...]
    counts: tuple[int, ...]
    num_tokens: int


def iterate_grams(
    model: PreTrainedModel,
    *,
    loaders: Mapping[str, Iterable[Batch]],
    memory_gb: float = 4.0,
    experts: Sequence[Sequence[int]] | None = None,
    columns: GramColumns = HIDDEN_CHANNELS,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Iterator[LayerGram]:
    """Grams of all MoE layers in order, a few layers at a time: each pass over the text fills what fits in memory.

    The model must stay uncut until the last layer has been yielded: every Gram is one of the unpruned model. A pass
    ends at its last layer, so earlier layers cost less. Sums run over all corpora together.

    Args:
        model: a model of a known family.
        loaders: corpus name -> batches, as for `collect_statistics`; every loader is read once per pass.
        memory_gb: GiB that the Gram matrices of one pass may take.
        experts: per layer the experts whose Grams are wanted; all when not given.
        columns: what the Grams are of.
        progress: show a progress bar.
        processes: those that share the batches, as for `collect_statistics`. Grams are added up in their own type, so
            those of several processes differ from one's in the last digits.

    Raises:
        ValueError: one layer alone needs more than `memory_gb`, or a corpus is empty or only padding.
    """
    layers = moe_layers(model)
    wanted = [tuple(range(len(expert_widths(layer.experts)))) for layer in layers] if experts is None else experts
    sizes = [{expert: columns.count(layer, expert) for expert in wanted[layer.index]} for layer in layers]
    groups = _plan_passes(layers, sizes=sizes, memory_gb=memory_gb, dtype=sum_dtype(model.dtype))
    for group in groups:
        observer = _GramObserver(model, layers=group, columns=columns, sizes=sizes)
        title = f"Gram matrices, layers {group[0].index}-{group[-1].index} of {len(layers)}"
        reader = TextReader(loaders, device=model.device, progress=progress, processes=processes, title=title)
        with processes.together(), evaluating(model), observed(group, observer=observer):
            for _, inputs in reader:
                observer.run_batch(inputs)
        yield from observer.grams(num_tokens=reader.check_not_empty(), processes=processes)


def _plan_passes(
    layers: Sequence[MoeLayer], *, sizes: Sequence[Mapping[int, int]], memory_gb: float, dtype: torch.dtype
) -> list[list[MoeLayer]]:
    """Layers of each pass; says what it will cost before anything runs."""
    memory = [_NUM_HALVES * dtype.itemsize * sum(m**2 for m in sizes[layer.index].values()) for layer in layers]
    largest = max(memory)
    if largest > memory_gb * _GB:
        raise ValueError(
            f"`memory_gb` must be at least {largest / _GB:.3g}: the Gram matrices of "
            f"'{layers[memory.index(largest)].name}' take that much, got {memory_gb}. Raise it, or do without repair."
        )
    groups: list[list[MoeLayer]] = []
    used = float("inf")
    for layer, size in zip(layers, memory, strict=True):
        if used + size > memory_gb * _GB:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += size
    log.info(
        "Gram matrices: %d pass(es) over the text, layers per pass %s, %.2f GiB in all, %.2f at a time.",
        len(groups),
        [len(group) for group in groups],
        sum(memory) / _GB,
        max(sum(memory[layer.index] for layer in group) for group in groups) / _GB,
    )
    return groups


class _PassDone(Exception):  # noqa: N818
    """Ends a forward pass after the last layer that is wanted."""


class _GramObserver(LayerObserver):
    """Adds up the Grams of the layers of one pass."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layers: Sequence[MoeLayer],
        columns: GramColumns,
        sizes: Sequence[Mapping[int, int]],
    ) -> None:
        self.decoder = model.get_decoder()
        self.config = model.config.get_text_config()
        self.layers = layers
        self.columns, self.sizes = columns, sizes
        dtype = sum_dtype(model.dtype)
        self.halves = {layer.index: tuple(self._zeros(layer, dtype) for _ in range(_NUM_HALVES)) for layer in layers}
        self.counts = {
            layer.index: torch.zeros(len(expert_widths(layer.experts)), dtype=torch.int64) for layer in layers
        }

    def _zeros(self, layer: MoeLayer, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """One half of a layer's Grams, empty for experts that are not asked for."""
        device, sizes = next(layer.experts.parameters()).device, self.sizes[layer.index]
        sizes_E = [sizes.get(expert, 0) for expert in range(len(expert_widths(layer.experts)))]
        return tuple(torch.zeros(size, size, dtype=dtype, device=device) for size in sizes_E)

    def run_batch(self, inputs: Mapping[str, Tensor]) -> None:
        """Runs the decoder up to the last layer of this pass."""
        self.class_T = self._token_classes(inputs)
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                self.decoder(**inputs, use_cache=False)
        except _PassDone:
            pass

    def _token_classes(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Tokens that are not padding, numbered in their row: even ones 0, odd ones 1; padding 2."""
        counted_BS = torch.ones_like(inputs["input_ids"])
        if "attention_mask" in inputs:
            counted_BS = (inputs["attention_mask"] != 0).to(counted_BS.dtype)
        position_BS = counted_BS.cumsum(1) - 1
        return torch.where(counted_BS.bool(), position_BS % _NUM_HALVES, _PADDING).reshape(-1)

    def run_experts(self, layer: MoeLayer, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The experts' output; keeps this layer's columns."""
        num_experts = len(expert_widths(layer.experts))
        self.pairs = RoutedPairs.sort(
            index_TK,
            weights_TK,
            class_T=self.class_T,
            num_classes=_NUM_HALVES + 1,
            num_experts=num_experts,
            dtype=sum_dtype(hidden_TH.dtype),
        )
        routed_TH = torch.zeros_like(hidden_TH, dtype=sum_dtype(hidden_TH.dtype))
        passes = expert_passes(layer.experts, hidden_TH, pairs=self.pairs, routed_TH=routed_TH)
        wanted = self.sizes[layer.index]
        self.values = {one.expert: self.columns.values(layer, one) for one in passes if one.expert in wanted}
        return routed_TH.to(hidden_TH.dtype)

    def end_layer(self, layer: MoeLayer, output_TH: Tensor) -> None:
        """Adds this batch's Grams; ends the pass after its last layer."""
        inverse_T, _ = inverse_energy(output_TH, scale=layer.family.output_scale(self.config))
        root_S = self.pairs.gate_S * inverse_T[self.pairs.token_S].sqrt()
        halves, counts_E = self.halves[layer.index], self.counts[layer.index]
        rows_E = map(self.pairs.counted_rows, range(len(counts_E)))
        counts_E += torch.tensor([rows.stop - rows.start for rows in rows_E])
        for expert, values_Sm in self.values.items():
            first = self.pairs.counted_rows(expert).start
            for half in range(_NUM_HALVES):
                rows = self.pairs.class_rows(expert, half)
                part_Sm = values_Sm[rows.start - first : rows.stop - first]
                weighted_Sm = part_Sm.to(root_S.dtype) * root_S[rows].unsqueeze(1)
                halves[half][expert].add_(product(weighted_Sm.T, weighted_Sm))
        self.values = {}
        if layer is self.layers[-1]:
            raise _PassDone

    def grams(self, *, num_tokens: int, processes: Processes) -> Iterator[LayerGram]:
        """One record a layer, added up over the processes; memory is freed as the caller moves on."""
        for layer in self.layers:
            half_a, half_b = self.halves.pop(layer.index)
            for tensor in (*half_a, *half_b, self.counts[layer.index]):
                if tensor.numel():
                    processes.sum_(tensor)
            yield LayerGram(
                layer_index=layer.index,
                half_a=half_a,
                half_b=half_b,
                counts=tuple(self.counts[layer.index].tolist()),
                num_tokens=num_tokens,
            )
