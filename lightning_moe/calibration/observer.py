"""Stand in for the experts of a model during a forward pass, and leave nothing behind.

T tokens, K experts per token, E experts, H hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_moe.adapters.experts import DoraExperts
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import MoeLayer

ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]


class LayerObserver(ABC):
    """Replaces the experts' computation of some layers and sees what happens around it."""

    @abstractmethod
    def run_experts(self, layer: MoeLayer, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Called in place of the experts; returns their output `[T, H]`."""

    @abstractmethod
    def end_layer(self, layer: MoeLayer, output_TH: Tensor) -> None:
        """Called when the decoder layer is done, with its output (residual included)."""

    def end_router(self, layer: MoeLayer, logits_TE: Tensor) -> None:
        """Called when the router is done."""
        del layer, logits_TE


@contextmanager
def observed(layers: Sequence[MoeLayer], *, observer: LayerObserver) -> Iterator[None]:
    """Hands every forward of these layers to `observer`; everything is as before afterwards, also after an exception.

    Raises:
        ValueError: weights are not in memory, or adapters that are not ours are around the experts.
    """
    for layer in layers:
        _check_experts(layer)
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(layer.experts, _experts_forward(layer, observer)))
            stack.callback(layer.router.register_forward_hook(_router_hook(layer, observer)).remove)
            stack.callback(layer.decoder_layer.register_forward_hook(_layer_hook(layer, observer)).remove)
        yield


def _check_experts(layer: MoeLayer) -> None:
    own = dict(layer.experts.named_parameters(recurse=False))
    if not isinstance(layer.experts, ChannelExperts | DoraExperts) and "gate_up_proj" not in own:
        raise ValueError(
            f"'{layer.name}' is a {type(layer.experts).__name__}, not a layer's experts or our adapter around them. "
            "Merge or remove other adapters before calibrating."
        )
    if any(parameter.device.type == "meta" for parameter in layer.experts.parameters()):
        raise ValueError(
            f"'{layer.name}' is on the meta device: its weights are offloaded or not loaded. "
            "Calibrate with all experts in memory (in 4 bit, if they do not fit otherwise)."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every module gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """One way for every module, packed ones included: an attribute of the instance hides its class's method."""
    before = {key: value for key, value in vars(module).items() if key == "forward"}
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        vars(module).update(before)


def _experts_forward(layer: MoeLayer, observer: LayerObserver) -> ExpertsForward:
    """Under autocast the experts see its type, and the statistics none of it: their sums stay wide."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        with torch.autocast(device, enabled=False):
            output_TH = observer.run_experts(layer, hidden_states.to(dtype), top_k_index, top_k_weights)
        return output_TH.to(hidden_states.dtype)

    return forward


def _router_hook(layer: MoeLayer, observer: LayerObserver) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        logits_TE = output[0]
        with torch.autocast(logits_TE.device.type, enabled=False):
            observer.end_router(layer, logits_TE.reshape(-1, logits_TE.shape[-1]))

    return hook


def _layer_hook(layer: MoeLayer, observer: LayerObserver) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        with torch.autocast(hidden.device.type, enabled=False):
            observer.end_layer(layer, hidden.reshape(-1, hidden.shape[-1]))

    return hook
