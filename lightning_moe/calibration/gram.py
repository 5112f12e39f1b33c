"""Second pass: Gram matrices of every expert's channels, for the least-squares repair (method, sections 1 and 5).

T tokens, K experts per token, S = T*K routed pairs sorted by expert, E experts, n channels of an expert, H hidden.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.calibration.collector import Batch, decoder_inputs
from lightning_moe.calibration.observer import LayerObserver, evaluating, observed
from lightning_moe.calibration.routed import RoutedPairs, expert_passes, inverse_energy, sum_dtype
from lightning_moe.models.discovery import MoeLayer, expert_widths, moe_layers
from lightning_moe.models.products import product

log = logging.getLogger(__name__)

# Token classes: two halves of the stream, padding last.
_NUM_HALVES, _PADDING = 2, 2
_GB = 2**30


@dataclass(frozen=True, kw_only=True)
class LayerGram:
    """`sum g^2 q h h^T` over the pairs routed to each expert, separately for two halves of the tokens.

    Half A is every second token of the stream (padding left out), half B the others. `q` holds the family's residual
    multiplier, so that `tr(D^T G D)` is a relative squared error of the layer's output, summed over tokens.

    Args:
        layer_index: position among the MoE layers.
        half_a: per expert `[n, n]` in fp32 (float64 for a float64 model); `[0, 0]` for an expert not asked for.
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
    progress: bool = True,
) -> Iterator[LayerGram]:
    """Grams of all MoE layers in order, a few layers at a time: each pass over the text fills what fits in memory.

    The model must stay uncut until the last layer has been yielded: every Gram is one of the unpruned model. A pass
    ends at its last layer, so earlier layers cost less. Sums run over all corpora together.

    Args:
        model: a model of a known family.
        loaders: corpus name -> batches, as for `collect_statistics`; every loader is read once per pass.
        memory_gb: GiB that the Gram matrices of one pass may take.
        experts: per layer the experts whose Grams are wanted; all when not given.
        progress: show a progress bar.

    Raises:
        ValueError: one layer alone needs more than `memory_gb`, or a corpus is empty or only padding.
    """
    layers = moe_layers(model)
    wanted = [tuple(range(len(expert_widths(layer.experts)))) for layer in layers] if experts is None else experts
    groups = _plan_passes(layers, wanted=wanted, memory_gb=memory_gb, dtype=sum_dtype(model.dtype))
    for group in groups:
        observer = _GramObserver(model, layers=group, wanted=wanted)
        title = f"Gram matrices, layers {group[0].index}-{group[-1].index} of {len(layers)}"
        with evaluating(model), observed(group, observer=observer):
            for _, inputs in decoder_inputs(loaders, device=model.device, progress=progress, title=title):
                observer.run_batch(inputs)
        yield from observer.grams()


def _plan_passes(
    layers: Sequence[MoeLayer], *, wanted: Sequence[Sequence[int]], memory_gb: float, dtype: torch.dtype
) -> list[list[MoeLayer]]:
    """Layers of each pass; says what it will cost before anything runs."""
    sizes = [_gram_bytes(layer, wanted=wanted[layer.index], dtype=dtype) for layer in layers]
    largest = max(sizes)
    if largest > memory_gb * _GB:
        raise ValueError(
            f"`memory_gb` must be at least {largest / _GB:.3g}: the Gram matrices of "
            f"'{layers[sizes.index(largest)].name}' take that much, got {memory_gb}. Raise it, or do without repair."
        )
    groups: list[list[MoeLayer]] = []
    used = float("inf")
    for layer, size in zip(layers, sizes, strict=True):
        if used + size > memory_gb * _GB:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += size
    log.info(
        "Gram matrices: %d pass(es) over the text, layers per pass %s, %.2f GiB in all, %.2f at a time.",
        len(groups),
        [len(group) for group in groups],
        sum(sizes) / _GB,
        max(sum(sizes[layer.index] for layer in group) for group in groups) / _GB,
    )
    return groups


def _gram_bytes(layer: MoeLayer, *, wanted: Sequence[int], dtype: torch.dtype) -> int:
    widths = expert_widths(layer.experts)
    return _NUM_HALVES * dtype.itemsize * sum(widths[expert] ** 2 for expert in wanted)


class _PassDone(Exception):  # noqa: N818
    """Ends a forward pass after the last layer that is wanted."""


class _GramObserver(LayerObserver):
    """Adds up the Grams of the layers of one pass."""

    def __init__(self, model: PreTrainedModel, *, layers: Sequence[MoeLayer], wanted: Sequence[Sequence[int]]) -> None:
        self.decoder = model.get_decoder()
        self.config = model.config.get_text_config()
        self.layers = layers
        self.wanted = {layer.index: frozenset(wanted[layer.index]) for layer in layers}
        self.halves: dict[int, tuple[tuple[Tensor, ...], ...]] = {}
        self.counts: dict[int, Tensor] = {}
        self.num_tokens = 0

    def run_batch(self, inputs: Mapping[str, Tensor]) -> None:
        """Runs the decoder up to the last layer of this pass."""
        self.class_T = self._token_classes(inputs)
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                self.decoder(**inputs, use_cache=False)
        except _PassDone:
            pass
        self.num_tokens += int((self.class_T != _PADDING).sum())

    def _token_classes(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Tokens that are not padding, numbered through all batches: even ones 0, odd ones 1; padding 2."""
        counted_T = torch.ones_like(inputs["input_ids"]).reshape(-1)
        if "attention_mask" in inputs:
            counted_T = (inputs["attention_mask"] != 0).reshape(-1).to(counted_T.dtype)
        position_T = counted_T.cumsum(0) - 1 + self.num_tokens
        return torch.where(counted_T.bool(), position_T % _NUM_HALVES, _PADDING)

    def run_experts(self, layer: MoeLayer, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The experts' output; keeps the hidden activations of this layer."""
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
        self.hidden = {one.expert: one.hidden_Sn for one in passes}
        return routed_TH.to(hidden_TH.dtype)

    def end_layer(self, layer: MoeLayer, output_TH: Tensor) -> None:
        """Adds this batch's Grams; ends the pass after its last layer."""
        inverse_T, _ = inverse_energy(output_TH, scale=layer.family.output_scale(self.config))
        root_S = self.pairs.gate_S * inverse_T[self.pairs.token_S].sqrt()
        halves = self._halves(layer, like=root_S)
        for expert in self.wanted[layer.index] & self.hidden.keys():
            first = self.pairs.counted_rows(expert).start
            for half in range(_NUM_HALVES):
                rows = self.pairs.class_rows(expert, half)
                hidden_Sn = self.hidden[expert][rows.start - first : rows.stop - first]
                weighted_Sn = hidden_Sn.to(root_S.dtype) * root_S[rows].unsqueeze(1)
                halves[half][expert].add_(product(weighted_Sn.T, weighted_Sn))
        self.hidden = {}
        if layer is self.layers[-1]:
            raise _PassDone

    def _halves(self, layer: MoeLayer, *, like: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        num_experts = len(expert_widths(layer.experts))
        bounds = self.pairs.routing.bounds
        ends = torch.tensor([self.pairs.counted_rows(e).stop - bounds[e * 3] for e in range(num_experts)])
        self.counts[layer.index] = self.counts.get(layer.index, 0) + ends
        if layer.index not in self.halves:
            widths = expert_widths(layer.experts)
            sizes = [widths[e] if e in self.wanted[layer.index] else 0 for e in range(num_experts)]
            self.halves[layer.index] = tuple(
                tuple(like.new_zeros(size, size) for size in sizes) for _ in range(_NUM_HALVES)
            )
        return self.halves[layer.index]

    def grams(self) -> Iterator[LayerGram]:
        """One record a layer; memory is freed as the caller moves on."""
        for layer in self.layers:
            half_a, half_b = self.halves.pop(layer.index)
            yield LayerGram(
                layer_index=layer.index,
                half_a=half_a,
                half_b=half_b,
                counts=tuple(self.counts[layer.index].tolist()),
                num_tokens=self.num_tokens,
            )
