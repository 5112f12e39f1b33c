"""Calibration: one ordinary forward pass over text gives every statistic (method, section 1).

B sequences, S tokens of one, T = B*S tokens, K experts per token, E experts, H hidden,
X any of these.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.calibration.measure import CountedTokens, LayerMeasurement, OutputBuffer, router_sums, weight_norms
from lightning_moe.calibration.nonfinite import NonFiniteError, nonfinite_place
from lightning_moe.calibration.observer import LayerObserver, evaluating, observed
from lightning_moe.calibration.processes import ALONE, Processes, reduce_sums
from lightning_moe.calibration.text import Batch, TextReader, vocab_size
from lightning_moe.calibration.unseen import report_unseen
from lightning_moe.models.discovery import MoeLayer, model_shape, moe_layers
from lightning_moe.records import CalibrationStatistics


class CalibrationCollector(LayerObserver):
    """Adds up the statistics of every MoE layer while the model runs on text.

    A context manager: inside it the model is in eval mode and its experts are computed by us (same output), expert by
    expert; outside it the model is as it was, also after an exception.

        with CalibrationCollector(model) as collector:
            for batch in loader:
                with collector.batch(corpus="code", attention_mask=batch["attention_mask"]):
                    model.get_decoder()(**batch, use_cache=False)
        statistics = collector.statistics()

    Sums of a batch are taken in float32 (float64 for a float64 model) and added up in float64, so neither the order
    nor the size of the batches matters. Only one layer's activations are held at a time.

    Args:
        model: a model of a known family; stock experts, ChannelExperts or packed ones.
        moments: take the [E, H] and [E, E] sums too (output_sum, output_sq, input_sq, output_gram).
        layers: only of these MoE layers, the only ones that have to be in memory; all of them when not given.

    Raises:
        ValueError: unknown family, or weights that are not in memory.
    """

    def __init__(
        self, model: PreTrainedModel, *, moments: bool = True, layers: Sequence[MoeLayer] | None = None
    ) -> None:
        self.model = model
        self.moments = moments
        self.layers = moe_layers(model) if layers is None else list(layers)
        self._position = {layer.index: position for position, layer in enumerate(self.layers)}
        self._sums: dict[str, list[dict[str, Tensor]]] = {}
        self._num_batches: dict[str, int] = {}
        self._stack: ExitStack | None = None
        self._corpus: str | None = None
        self._mask: Tensor | None = None
        self._tokens: CountedTokens | None = None
        self._outputs: OutputBuffer | None = None
        self._current: LayerMeasurement | None = None
        self._finite: list[tuple[int, Tensor]] = []

    def __enter__(self) -> Self:
        """Takes over the experts."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(observed(self.layers, observer=self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Gives the experts back."""
        if self._stack is not None:
            self._stack.close()
        self._stack = None

    @contextmanager
    def batch(self, *, corpus: str, attention_mask: Tensor | None = None) -> Iterator[None]:
        """Run the model on one batch inside this context (gradients are off there).

        Args:
            corpus: the name under which its statistics are kept.
            attention_mask: `[B, S]`, 0 for padding, which never counts; every token counts when not given.

        Raises:
            ValueError: used outside the collector's context, a mask of another form, the model was not run, or the
                activations of a layer hold NaN or infinity (the message names layer, expert, corpus and batch).
        """
        self._check_batch(corpus, attention_mask)
        self._corpus, self._mask, self._tokens, self._finite = corpus, attention_mask, None, []
        self._outputs = OutputBuffer() if self.moments else None
        self._num_batches[corpus] = self._num_batches.get(corpus, 0) + 1
        self._sums.setdefault(corpus, [{} for _ in self.layers])
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                yield
            self._check_finite(corpus)
        finally:
            self._corpus = self._mask = self._tokens = self._outputs = self._current = None

    def reduce(self, processes: Processes) -> None:
        """Adds up over processes that each ran their batches; all then hold the same sums. Each calls this once."""
        if processes.size == 1:
            return
        shapes: dict[str, list[dict[str, torch.Size]]] = {}
        for known in processes.gather({corpus: _shapes(layers) for corpus, layers in self._sums.items()}):
            shapes |= known
        for corpus in sorted(shapes):
            layers = self._sums.setdefault(corpus, [{} for _ in self.layers])
            for layer, sums, wanted in zip(self.layers, layers, shapes[corpus], strict=True):
                device = next(layer.experts.parameters()).device
                for name, size in wanted.items():
                    sums.setdefault(name, torch.zeros(size, dtype=torch.float64, device=device))
                reduce_sums(sums, processes=processes)

    def statistics(self) -> CalibrationStatistics:
        """Everything that was added up so far.

        Raises:
            ValueError: no batch was run, or a corpus has no token that is not padding.
        """
        if not self._sums:
            raise ValueError("Calibration saw 0 batches. Run the model inside `collector.batch(corpus=...)` first.")
        for corpus, layers in self._sums.items():
            if not all(layers) or not all(float(sums["num_tokens"]) for sums in layers):
                raise ValueError(
                    f"Corpus '{corpus}' has 0 tokens that are not padding. Give it text, and check its attention mask."
                )
        return CalibrationStatistics(
            shape=model_shape(self.model),
            corpora=self.sums(),
            weights=tuple(weight_norms(layer.experts) for layer in self.layers),
        )

    def sums(self) -> dict[str, tuple[dict[str, Tensor], ...]]:
        """Corpus -> for each of the layers -> name -> what was added up so far, float64 on the CPU."""
        return {
            corpus: tuple({name: value.cpu() for name, value in sums.items()} for sums in layers)
            for corpus, layers in self._sums.items()
        }

    def end_router(self, layer: MoeLayer, logits_TE: Tensor) -> None:
        """Adds the router's probabilities."""
        tokens = self._counted_tokens(layer, logits_TE)
        self._add(layer, router_sums(tokens.select(logits_TE), score=layer.family.score))

    def run_experts(self, layer: MoeLayer, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The experts' output `[T, H]`; keeps what the end of the layer needs."""
        tokens = self._counted_tokens(layer, hidden_TH)
        self._current = LayerMeasurement(layer.experts, tokens=tokens, outputs=self._outputs)
        return self._current.run(hidden_TH, index_TK, weights_TK)

    def end_layer(self, layer: MoeLayer, output_TH: Tensor) -> None:
        """Adds the layer's sums and drops its activations."""
        if self._current is None:
            raise ValueError(f"'{layer.name}' ended without a call of its experts. Run the whole decoder layer.")
        scale = layer.family.output_scale(self.model.config.get_text_config())
        self._add(layer, self._current.finish(output_TH, scale=scale))
        self._current = None

    def _add(self, layer: MoeLayer, sums: Mapping[str, Tensor]) -> None:
        assert self._corpus is not None
        totals = self._sums[self._corpus][self._position[layer.index]]
        for name, value in sums.items():
            value = value.double()
            if name not in totals:
                totals[name] = value.clone()
            elif name.startswith("max_"):
                torch.maximum(totals[name], value, out=totals[name])
            else:
                totals[name] += value
        finite = torch.stack([value.double().sum() for value in sums.values()]).isfinite().all()
        self._finite.append((self._position[layer.index], finite))

    def _counted_tokens(self, layer: MoeLayer, like_TX: Tensor) -> CountedTokens:
        if self._corpus is None:
            raise ValueError(f"'{layer.name}' ran outside a batch. Run the model inside `collector.batch(corpus=...)`.")
        num_tokens = len(like_TX)
        if self._mask is not None and self._mask.numel() != num_tokens:
            raise ValueError(
                f"`attention_mask` of shape {tuple(self._mask.shape)} does not fit a batch of {num_tokens} tokens. "
                "Give the mask of this batch, one number per token, and run the model without a cache."
            )
        if self._tokens is None:
            self._tokens = CountedTokens.from_mask(self._mask, num_tokens=num_tokens, device=like_TX.device)
        return self._tokens

    def _check_batch(self, corpus: str, attention_mask: Tensor | None) -> None:
        if self._stack is None:
            raise ValueError("The collector is not active. Use it as `with CalibrationCollector(model) as collector:`.")
        if not isinstance(corpus, str) or not corpus:
            raise ValueError(f"`corpus` must be a name, got {corpus!r}.")
        if self._corpus is not None:
            raise ValueError(f"A batch of corpus '{self._corpus}' is still open. Leave it before the next one begins.")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"`attention_mask` must be [B, S] with 0 for padding, got {tuple(attention_mask.shape)}.")

    def _check_finite(self, corpus: str) -> None:
        """One host sync a batch."""
        number = self._num_batches[corpus]
        if not self._finite:
            raise ValueError(f"Batch {number} of corpus '{corpus}' did not run the model. Call it inside the context.")
        device = self._finite[0][1].device
        finite = torch.stack([flag.to(device) for _, flag in self._finite]).tolist()
        broken = [position for (position, _), flag in zip(self._finite, finite, strict=True) if not flag]
        if broken:
            layer = self.layers[min(broken)]
            place = nonfinite_place(layer, self._sums[corpus][min(broken)])
            message = (
                f"{layer.name}: NaN or infinity in batch {number} of corpus '{corpus}', first in {place}. "
                "Calibrate in bfloat16 or float32, and look at the weights."
            )
            raise NonFiniteError(message, layer=layer.name, place=place)


def _shapes(layers: Sequence[Mapping[str, Tensor]]) -> list[dict[str, torch.Size]]:
    return [{name: value.shape for name, value in sums.items()} for sums in layers]


def collect_statistics(
    model: PreTrainedModel,
    *,
    loaders: Mapping[str, Iterable[Batch]],
    moments: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> CalibrationStatistics:
    """Runs the decoder (not the language-model head) over every corpus and returns the statistics.

    Several processes run every `size`-th batch each, however many batches there are, and all get the same statistics.
    Nobody waits for another before all have read their share; an error of one is raised in all.

    Args:
        model: a model of a known family.
        loaders: corpus name -> batches with `input_ids` [B, S] and, where there is padding, `attention_mask` [B, S].
        moments: take the [E, H] and [E, E] sums too.
        device: where the batches go; the model's device when not given.
        progress: show a progress bar.
        processes: those that share the batches; each has the whole model and sees the same loaders.

    Raises:
        ValueError: no corpus, an empty loader, a corpus of padding only, NaN or infinity in a layer.
    """
    decoder = model.get_decoder()
    reader = TextReader(
        loaders,
        device=device or model.device,
        progress=progress,
        processes=processes,
        vocab_size=vocab_size(model),
    )
    with CalibrationCollector(model, moments=moments) as collector:
        with processes.together():
            for corpus, inputs in reader:
                with collector.batch(corpus=corpus, attention_mask=inputs.get("attention_mask")):
                    decoder(**inputs, use_cache=False)
        reader.check_not_empty()
        collector.reduce(processes)
        statistics = collector.statistics()
    if processes.rank == 0:
        report_unseen(statistics)
    return statistics
