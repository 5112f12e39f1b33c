"""Optional second pass: derivatives of the language-model loss with respect to every channel.

B sequences, S positions, V vocabulary, T = B*S tokens, K experts per token, P pairs routed to one expert, n channels of
an expert, C of a layer, H hidden.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lightning_moe.calibration.observer import LayerObserver, evaluating, observed
from lightning_moe.calibration.routed import effective_matrices, sum_dtype
from lightning_moe.calibration.text import Batch, TextReader, vocab_size
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import MoeLayer, expert_widths, moe_layers

# h_Pn * dL/dh_Pn of the pairs routed to one expert
_Receiver = Callable[[Tensor], None]


def collect_gradients(
    model: PreTrainedModel, *, loaders: Mapping[str, Iterable[Batch]], progress: bool = True
) -> dict[str, tuple[dict[str, Tensor], ...]]:
    """`loss_snip` and `loss_taylor` of every channel, for `CalibrationStatistics.with_sums`; with `num_tokens`.

    For a sequence (a row of a batch) with next-token loss L in nats, summed over its tokens, `d_c = sum_t h_c dL/dh_c`
    is the derivative of L with respect to a factor on channel c. It also goes through the gate weights of later layers;
    which experts are chosen is held. `loss_snip` is the sum of `d_c` over sequences (signed), `loss_taylor` the sum of
    `d_c^2`. Both add up over batches, corpora and files, and neither depends on how sequences are batched.

    No gradient of a weight is ever made: memory is the activations of one batch. A position counts when it and the
    next are not padding. The model's flags (`requires_grad`, mode) are as before afterwards.

    Args:
        model: a model of a known family with weights of a floating-point type, stock experts or ChannelExperts.
        loaders: corpus name -> batches, as for `collect_statistics`.
        progress: show a progress bar.

    Returns:
        Corpus -> one mapping per MoE layer -> statistic name -> float64 `[C]` on the CPU; and `num_tokens`.

    Raises:
        ValueError: experts packed to 4 bit, no corpus, an empty one, or one of padding only.
    """
    layers = moe_layers(model)
    check_unpacked(layers)
    reader = TextReader(
        loaders, device=model.device, progress=progress, title="Gradients", vocab_size=vocab_size(model)
    )
    observer = _GradientObserver(layers)
    with evaluating(model), observed(layers, observer=observer), _differentiable_inputs(model):
        for corpus, inputs in reader:
            observer.begin(corpus, row_length=inputs["input_ids"].shape[1])
            loss = _summed_loss(model(**inputs, use_cache=False).logits, inputs)
            loss.backward()
    reader.check_not_empty()
    counts = {name: torch.tensor(float(count), dtype=torch.float64) for name, count in reader.num_tokens.items()}
    return {
        corpus: tuple(
            {name: value_C.cpu() for name, value_C in sums.items()} | {"num_tokens": counts[corpus]} for sums in totals
        )
        for corpus, totals in observer.totals.items()
    }


class _GradientObserver(LayerObserver):
    """Runs the experts one by one under autograd and adds up what backward shows."""

    def __init__(self, layers: list[MoeLayer]) -> None:
        self.layers = layers
        self.totals: dict[str, list[dict[str, Tensor]]] = {}
        self._current: list[dict[str, Tensor]] = []
        self._row_length = 1

    def begin(self, corpus: str, *, row_length: int) -> None:
        """The next batch is of this corpus, its rows of this many tokens."""
        self._current = self.totals.setdefault(corpus, [_empty_sums(layer.experts) for layer in self.layers])
        self._row_length = row_length

    def run_experts(self, layer: MoeLayer, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The experts' output `[T, H]`, every expert's channels watched."""
        base = layer.base_experts
        act_fn = base.get_submodule("act_fn")
        num_rows = len(hidden_TH) // self._row_length
        output_TH = torch.zeros_like(hidden_TH, dtype=sum_dtype(hidden_TH.dtype))
        start = 0
        for expert, width in enumerate(expert_widths(layer.experts)):
            token_P, slot_P = torch.where(index_TK == expert)
            if width and len(token_P):
                gate_nH, up_nH, down_nH = effective_matrices(layer.experts, expert, dtype=hidden_TH.dtype)
                input_PH = hidden_TH[token_P]
                hidden_Pn = act_fn(input_PH @ gate_nH.T) * (input_PH @ up_nH.T)
                sums = {name: value_C[start : start + width] for name, value_C in self._current[layer.index].items()}
                receiver = partial(_add, sums, row_P=token_P // self._row_length, num_rows=num_rows)
                output_PH = _Watched.apply(hidden_Pn, receiver) @ down_nH * weights_TK[token_P, slot_P].unsqueeze(1)
                output_TH.index_add_(0, token_P, output_PH.to(output_TH.dtype))
            start += width
        if isinstance(base, ChannelExperts):
            output_TH = base.add_novices(output_TH, index_TK, weights_TK)
        return output_TH.to(hidden_TH.dtype)

    def end_layer(self, layer: MoeLayer, output_TH: Tensor) -> None:
        """Nothing is needed of the layer's end."""


class _Watched(torch.autograd.Function):
    """The identity; backward hands value times gradient to a receiver."""

    @staticmethod
    def forward(ctx: Any, hidden_Pn: Tensor, receiver: _Receiver) -> Tensor:
        ctx.save_for_backward(hidden_Pn)
        ctx.receiver = receiver
        return hidden_Pn.view_as(hidden_Pn)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (hidden_Pn,) = ctx.saved_tensors
        ctx.receiver(hidden_Pn.double() * gradients[0].double())
        return gradients[0], None


def _add(sums: Mapping[str, Tensor], product_Pn: Tensor, *, row_P: Tensor, num_rows: int) -> None:
    """All pairs of a sequence and an expert are in one call, so its derivative is whole and may be squared."""
    derivative_Bn = product_Pn.new_zeros(num_rows, product_Pn.shape[1]).index_add_(0, row_P, product_Pn)
    sums["loss_snip"].add_(derivative_Bn.sum(0))
    sums["loss_taylor"].add_(derivative_Bn.square().sum(0))


def _empty_sums(experts: nn.Module) -> dict[str, Tensor]:
    device, num_channels = next(experts.parameters()).device, sum(expert_widths(experts))
    return {
        name: torch.zeros(num_channels, dtype=torch.float64, device=device) for name in ("loss_snip", "loss_taylor")
    }


def _summed_loss(logits_BSV: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    ids_BS = inputs["input_ids"]
    counts_BS = inputs.get("attention_mask", torch.ones_like(ids_BS)) != 0
    label_BS = ids_BS[:, 1:].masked_fill(~(counts_BS[:, 1:] & counts_BS[:, :-1]), -100)
    logits_BSV = logits_BSV[:, :-1].to(sum_dtype(logits_BSV.dtype))
    return functional.cross_entropy(logits_BSV.flatten(0, 1), label_BS.flatten(), reduction="sum")


@contextmanager
def _differentiable_inputs(model: PreTrainedModel) -> Iterator[None]:
    """Gradients flow from the token embeddings on, and to no weight; all flags are as before afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, output: output.requires_grad_())
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.inference_mode(mode=False), torch.enable_grad():
            yield
    finally:
        hook.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def check_unpacked(layers: Iterable[MoeLayer]) -> None:
    """Refuses experts in 4 bit.

    Raises:
        ValueError: with the name of the layer.
    """
    for layer in layers:
        experts = layer.base_experts
        if isinstance(experts, ChannelExperts) and experts.packed:
            raise ValueError(
                f"'{layer.name}' is packed to 4 bit, and gradients are taken in floating point only. "
                "Take them on the unpacked model, or calibrate without `--gradients true`."
            )
