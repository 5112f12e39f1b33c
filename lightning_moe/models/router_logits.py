"""What the routers of a model said in a forward pass: logits with gradients, and the experts they chose.

T tokens, E experts (of one layer: their number may differ between layers), K experts per token.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.models.discovery import MoeLayer, moe_layers
from lightning_moe.models.routers import row_tensor, without_adapter


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterOutput:
    """One router in one forward pass.

    Args:
        index: position of its layer among the MoE layers.
        logits_TE: its logits.
        index_TK: the experts it chose.
        score: how logits become probabilities.
        with_gradients: whether autograd was on when the router ran.
        masked_E: experts that its selection bias masks; None in families without such a bias.
    """

    index: int
    logits_TE: Tensor
    index_TK: Tensor
    score: Literal["softmax", "sigmoid"]
    with_gradients: bool
    masked_E: Tensor | None = None

    def evicted(self) -> Tensor:
        """Experts that can never be chosen, bool `[E]`: by the selection bias, or by logits that are -inf."""
        never_E = torch.isneginf(self.logits_TE.detach()).all(0)
        return never_E if self.masked_E is None else never_E | self.masked_E

    def probability(self) -> Tensor:
        """Float32 (or float64) probabilities `[T, E]` over the experts that are left; evicted ones have 0.

        Sigmoid scores are divided by their sum over the experts.
        """
        dtype = torch.promote_types(self.logits_TE.dtype, torch.float32)
        logits_TE = self.logits_TE.to(dtype).masked_fill(self.evicted(), float("-inf"))
        if self.score == "softmax":
            return logits_TE.softmax(-1)
        score_TE = logits_TE.sigmoid()
        return score_TE / score_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)


def watch_routers(layers: Sequence[MoeLayer], *, see: Callable[[RouterOutput], None]) -> ExitStack:
    """Hands what each router says in every forward pass to `see`, until the returned stack is closed.

    Adapters around routers are seen through their output. `see` must not compute with gradients: under gradient
    checkpointing, what it saved would be missing when the layer is computed again.
    """
    stack = ExitStack()
    for layer in layers:
        stack.callback(layer.router.register_forward_hook(_hook(layer, see=see)).remove)
    return stack


def _hook(
    layer: MoeLayer, *, see: Callable[[RouterOutput], None]
) -> Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        logits_TE, _, index_TK = output
        see(
            RouterOutput(
                index=layer.index,
                logits_TE=logits_TE.reshape(-1, logits_TE.shape[-1]),
                index_TK=index_TK.reshape(-1, index_TK.shape[-1]),
                score=layer.family.score,
                with_gradients=torch.is_grad_enabled(),
                masked_E=_masked_experts(layer),  # now: under FSDP2 the bias is whole only while its layer runs
            )
        )

    return hook


def _masked_experts(layer: MoeLayer) -> Tensor | None:
    """Experts with a selection bias of -inf, bool `[E]`."""
    if layer.family.selection_bias is None:
        return None
    bias = row_tensor(without_adapter(layer.router), layer.family.selection_bias)
    return torch.isneginf(bias.detach()).reshape(-1)


class RouterLogits:
    """Keeps the logits of every router, with gradients, while the block runs; leaves no hook behind.

    What is kept is the last forward pass in the block. Non-reentrant gradient checkpointing is fine: leave the block
    before backward, which computes the layers again.

        with RouterLogits(model) as routers:
            outputs = model(**batch)
        loss = outputs.loss + 0.01 * load_balancing_loss(routers.outputs, attention_mask=batch["attention_mask"])

    Args:
        model: any supported Mixture-of-Experts model.

    Raises:
        ValueError: the model is of an unknown family or has no MoE layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = moe_layers(model)
        self._hooks = ExitStack()
        self._outputs: dict[int, RouterOutput] = {}

    def __enter__(self) -> Self:
        self._outputs.clear()
        self._hooks = watch_routers(self._layers, see=self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    @property
    def outputs(self) -> tuple[RouterOutput, ...]:
        """One per MoE layer, in the order of the decoder.

        Raises:
            ValueError: not every router ran inside the block.
        """
        missing = [layer.router_name for layer in self._layers if layer.index not in self._outputs]
        if missing:
            raise ValueError(
                f"'{missing[0]}' did not run inside `with RouterLogits(model)`. Call the same model in the block."
            )
        return tuple(self._outputs[layer.index] for layer in self._layers)

    def _keep(self, output: RouterOutput) -> None:
        self._outputs[output.index] = output
