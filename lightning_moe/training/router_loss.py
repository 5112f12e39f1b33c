"""The routers' auxiliary loss, for layers with different numbers of experts.  T tokens, E experts, K experts per token.

L layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moe.models.router_logits import RouterLogits, RouterOutput

__all__ = ["RouterLogits", "load_balancing_loss"]


def load_balancing_loss(outputs: Sequence[RouterOutput], *, attention_mask: Tensor | None = None) -> Tensor:
    r"""Mean over layers of `E sum_e f_e P_e` (Fedus et al. 2022, equations 4 to 6), a float32 scalar.

    `f_e` is the number of tokens that chose expert e divided by the number of tokens (sums to K), `P_e` the mean
    probability of e, both over the tokens of this process that are no padding. Even routing gives K.

    On one layer this is transformers' `load_balancing_loss_func`. On several it is not: transformers adds f and P up
    over all layers before it multiplies them, so that layers can make up for each other (a layer that prefers expert
    0 and one that prefers expert 1 count as balanced), and it needs the same experts in every layer. Here each layer
    stands for itself, with the experts it has left: an evicted one counts neither in E nor in P. The experts
    counted are the ones that the router chose, with its groups and biases. Sigmoid scores are divided by their sum.

    Args:
        outputs: of every router, from `RouterLogits`.
        attention_mask: `[B, S]`, 0 for padding; None: every token counts.

    Raises:
        ValueError: there are no outputs, the mask is of another batch, or the loss is to have gradients and the
            routers ran without.

    Examples:
        Two tokens and two experts, one for each token: 2 (1/2 1/2 + 1/2 1/2). Both to the first: 2 (1 1 + 0 0).

        >>> def routed(logits_TE):
        ...     kinds = {"index": 0, "score": "softmax", "with_gradients": True}
        ...     return RouterOutput(logits_TE=logits_TE, index_TK=logits_TE.argmax(1, keepdim=True), **kinds)
        >>> load_balancing_loss([routed(torch.tensor([[99.0, 0.0], [0.0, 99.0]]))]).item()
        1.0
        >>> load_balancing_loss([routed(torch.tensor([[99.0, 0.0], [99.0, 0.0]]))]).item()
        2.0
    """
    if not outputs:
        raise ValueError("There are no router outputs. Run the model inside `with RouterLogits(model)`.")
    if torch.is_grad_enabled() and not all(output.with_gradients for output in outputs):
        raise ValueError(
            "The routers ran without gradients, so their loss would train nothing. Use non-reentrant gradient "
            "checkpointing (`use_reentrant: false`), and run the model outside `torch.no_grad()`."
        )
    loss_L = [_layer_loss(output, attention_mask=attention_mask) for output in outputs]
    return torch.stack([loss.to(loss_L[0].device) for loss in loss_L]).mean()


def _layer_loss(output: RouterOutput, *, attention_mask: Tensor | None) -> Tensor:
    probability_TE = output.probability()
    counted_T = _counted(attention_mask, like_T=probability_TE[:, 0])
    num_tokens = counted_T.sum().clamp(min=1)
    counted_TK = counted_T.unsqueeze(1).expand(output.index_TK.shape)
    chosen_E = probability_TE.new_zeros(probability_TE.shape[1])
    chosen_E.scatter_add_(0, output.index_TK.reshape(-1), counted_TK.reshape(-1))
    # Sums of products, not matrix products: autocast would round those to 16 bit.
    summed_E = (probability_TE * counted_T.unsqueeze(1)).sum(0)
    num_experts = (~output.evicted()).sum()
    return num_experts * (chosen_E / num_tokens * (summed_E / num_tokens)).sum()


def _counted(attention_mask: Tensor | None, *, like_T: Tensor) -> Tensor:
    """1 for tokens that count, 0 for padding: `[T]`."""
    if attention_mask is None:
        return torch.ones_like(like_T)
    counted_T = (attention_mask.reshape(-1) != 0).to(device=like_T.device, dtype=like_T.dtype)
    if len(counted_T) != len(like_T):
        raise ValueError(
            f"`attention_mask` has {len(counted_T)} tokens and the routers saw {len(like_T)}. Give the mask of the "
            "same batch, `[batch, tokens]`."
        )
    return counted_T
