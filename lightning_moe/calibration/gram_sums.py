"""Gram matrices of experts' channels, added up while layers run over text.

T tokens, K experts per token, S = T*K routed pairs sorted by expert, E experts, n channels of an expert, m columns of
a Gram, H hidden, B sequences of a batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lightning_moe.calibration.observer import LayerObserver
from lightning_moe.calibration.processes import Processes
from lightning_moe.calibration.routed import ExpertPass, RoutedPairs, expert_passes, inverse_energy, sum_dtype
from lightning_moe.models.discovery import MoeLayer, expert_widths
from lightning_moe.models.products import product

# Token classes: two halves of the stream, padding last.
_NUM_HALVES, _PADDING = 2, 2


class GramColumns(ABC):
    """What the columns of the Grams are."""

    @abstractmethod
    def count(self, layer: MoeLayer, expert: int) -> int:
        """Number of columns of an expert: m."""

    @abstractmethod
    def values(self, layer: MoeLayer, one: ExpertPass) -> Tensor:
        """The columns on an expert's counted pairs, `[S, m]`."""

    def forget(self, layer: MoeLayer) -> None:
        """Gives up what `values` may have kept of a layer: called after every pass over it."""
        del layer


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
        experts: those whose Grams these are, ascending; a layer that is larger than memory comes in several parts.
        half_a: per expert `[m, m]` in fp32 (float64 for a float64 model); `[0, 0]` for an expert that is not here.
        half_b: the same over the other tokens.
        counts: routed tokens of each expert, both halves together.
        num_tokens: tokens that count.
    """

    layer_index: int
    experts: tuple[int, ...]
    half_a: tuple[Tensor, ...]
    half_b: tuple[Tensor, ...]
    counts: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class GramPart:
    """Experts of a layer whose Grams are taken in one pass: expert -> number of columns."""

    layer: MoeLayer
    sizes: Mapping[int, int]

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of their Grams."""
        return sum(gram_bytes(size, dtype=dtype) for size in self.sizes.values())


def gram_bytes(num_columns: int, *, dtype: torch.dtype) -> int:
    """Bytes of one expert's Grams, both halves, added up in this type."""
    return _NUM_HALVES * dtype.itemsize * num_columns**2


class _PassDone(Exception):  # noqa: N818
    """Ends a forward pass after the last layer that is wanted."""


class GramObserver(LayerObserver):
    """Adds up the Grams of the layers of one pass; `ends_pass` cuts a forward pass short after the last of them.

    It should see the layers before them too, which then are computed in the same way in every pass: in 16 bit the
    model's own experts round differently, and Grams would depend on which layers share a pass.
    """

    needs_output = True  # whether the layer's output must be right; else only experts with Grams are run

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        parts: Sequence[GramPart],
        columns: GramColumns,
        dtype: torch.dtype,
        ends_pass: bool,
    ) -> None:
        self.config, self.columns, self.ends_pass = config, columns, ends_pass
        self.layers = [part.layer for part in parts]
        self.sizes = {part.layer.index: part.sizes for part in parts}
        self.halves = {
            layer.index: tuple(self._zeros(layer, dtype) for _ in range(_NUM_HALVES)) for layer in self.layers
        }
        self.counts = {
            layer.index: torch.zeros(len(expert_widths(layer.experts)), dtype=torch.int64) for layer in self.layers
        }

    def inverse_energy(self, layer: MoeLayer, output_TH: Tensor) -> Tensor:
        """`scale^2 / (||y||^2 + 1e-6)` of one batch of a layer, `[T]`."""
        return inverse_energy(output_TH, scale=layer.family.output_scale(self.config))[0]

    def _zeros(self, layer: MoeLayer, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """One half of a layer's Grams, empty for experts that are not asked for."""
        device, sizes = next(layer.experts.parameters()).device, self.sizes[layer.index]
        sizes_E = [sizes.get(expert, 0) for expert in range(len(expert_widths(layer.experts)))]
        return tuple(torch.zeros(size, size, dtype=dtype, device=device) for size in sizes_E)

    @contextmanager
    def batch(self, corpus: str, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the decoder, or one layer of it, on one batch inside this context."""
        del corpus
        self.class_T = self._token_classes(inputs)
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                yield
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
        """The experts' output `[T, H]`; keeps this layer's columns."""
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
        wanted = self.sizes.get(layer.index, {})
        only = None if self.needs_output else wanted
        passes = expert_passes(layer.experts, hidden_TH, pairs=self.pairs, routed_TH=routed_TH, wanted=only)
        self.values = {one.expert: self.columns.values(layer, one) for one in passes if one.expert in wanted}
        return routed_TH.to(hidden_TH.dtype)

    def end_layer(self, layer: MoeLayer, output_TH: Tensor) -> None:
        """Adds this batch's Grams; ends the pass after its last layer."""
        if layer.index not in self.sizes:
            return
        root_S = self.pairs.gate_S * self.inverse_energy(layer, output_TH)[self.pairs.token_S].sqrt()
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
        if self.ends_pass and layer is self.layers[-1]:
            raise _PassDone

    def grams(self, *, num_tokens: int, processes: Processes) -> Iterator[LayerGram]:
        """One record a layer, added up over the processes; memory is freed as the caller moves on.

        Raises:
            ValueError: a Gram holds NaN or infinity; the message names the layer.
        """
        for layer in self.layers:
            half_a, half_b = self.halves.pop(layer.index)
            with processes.together():
                _check_finite(layer, (half_a, half_b))
            for tensor in (*half_a, *half_b, self.counts[layer.index]):
                if tensor.numel():
                    processes.sum_(tensor)
            self.columns.forget(layer)
            yield LayerGram(
                layer_index=layer.index,
                experts=tuple(self.sizes[layer.index]),
                half_a=half_a,
                half_b=half_b,
                counts=tuple(self.counts[layer.index].tolist()),
                num_tokens=num_tokens,
            )


def _check_finite(layer: MoeLayer, halves: Sequence[Sequence[Tensor]]) -> None:
    """A trace, since NaN and infinity anywhere in an activation are on the diagonal; one host sync a layer."""
    traces = torch.stack([gram_mm.diagonal().sum() for half in halves for gram_mm in half])
    if not bool(traces.isfinite().all()):
        raise ValueError(
            f"{layer.name}: NaN or infinity in the activations that its down projections are refitted to. Prune in "
            "bfloat16 or float32, or without repair; `calibrate` on this text, in this type, names the expert."
        )


class RepeatedGramObserver(GramObserver):
    """One pass of several over one layer. All after the first need no output: they run their own experts alone.

    Args:
        config: of the model's text part.
        part: the experts of this pass.
        columns: what the Grams are of.
        dtype: type of the sums.
        energies: what `inverse_energy` gave for each batch of the first pass, which fills it.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        part: GramPart,
        columns: GramColumns,
        dtype: torch.dtype,
        energies: list[Tensor],
    ) -> None:
        super().__init__(config, parts=[part], columns=columns, dtype=dtype, ends_pass=False)
        self.needs_output = not energies
        self._first, self._later = energies, iter(list(energies))

    def inverse_energy(self, layer: MoeLayer, output_TH: Tensor) -> Tensor:
        """That of the first pass `[T]`: down rows of experts that are done may have changed since."""
        if not self.needs_output:
            return next(self._later)
        self._first.append(super().inverse_energy(layer, output_TH))
        return self._first[-1]
