"""Put a model in 4 bit and say what that changes: rounding undoes part of what merged adapters had learned.

B sequences, S tokens, V words, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts
from lightning_moe.quantization.linears import dense_weight, linears_to_pack, pack_linear, quantize_model
from lightning_moe.quantization.nf4 import check_hidden_size, pack_experts

# Rows that are compared at a time: they are held in fp32, twice.
_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class AddedError:
    """What 4 bit changed in a model.

    Args:
        weights: Name of each module that was packed (experts of a layer, or a Linear) -> `||W - Q(W)|| / ||W||`.
        kl: Mean over tokens of KL(p || q) in nats, p the model before and q after.
        max_logit_diff: Largest difference of a logit.
        num_tokens: Tokens that both were measured on.
        random_text: Whether these were random tokens, on which the last three say less than on text.
    """

    weights: Mapping[str, float]
    kl: float
    max_logit_diff: float
    num_tokens: int
    random_text: bool

    @classmethod
    def of(cls, weights: Mapping[str, float], *, before_BSV: Tensor, after_BSV: Tensor, random_text: bool) -> Self:
        """From the logits on the same tokens, each `[B, S, V]`."""
        p_BSV, q_BSV = (logits_BSV.double().log_softmax(-1) for logits_BSV in (before_BSV, after_BSV))
        return cls(
            weights=dict(weights),
            kl=float((p_BSV.exp() * (p_BSV - q_BSV)).sum(-1).mean().clamp_min(0)),
            max_logit_diff=float((before_BSV - after_BSV).abs().max()),
            num_tokens=before_BSV[..., 0].numel(),
            random_text=random_text,
        )

    def describe(self) -> str:
        """One line."""
        if not self.weights:
            return "4 bit adds nothing: everything was packed already"
        worst = max(self.weights, key=self.weights.__getitem__)
        mean = sum(self.weights.values()) / len(self.weights)
        text = "random tokens" if self.random_text else "tokens"
        return (
            f"4 bit adds a relative weight error of {mean:.4f} on average ({self.weights[worst]:.4f} in {worst}), "
            f"KL {self.kl:.2g} nats a token and at most {self.max_logit_diff:.2g} in a logit ({self.num_tokens} {text})"
        )


@torch.no_grad()
def quantize_measured(model: PreTrainedModel, *, ids_BS: Tensor | None = None) -> AddedError:
    """`quantize_model`, and what it changes: module by module in the weights, and in the model's output.

    Holds one layer twice, as `quantize_model` nearly does, and runs the model twice.

    Args:
        model: a cut model, adapters merged; packed in place.
        ids_BS: text to compare outputs on; 64 fixed random tokens if not given.

    Raises:
        ValueError: see `quantize_model`.
    """
    check_hidden_size(int(model.config.get_text_config().hidden_size))
    random_text = ids_BS is None
    ids_BS = _random_ids(model) if ids_BS is None else ids_BS
    before_BSV, weights = _logits(model, ids_BS), {}
    for name, module in model.named_modules():
        if isinstance(module, ChannelExperts) and not module.packed:
            weights[name] = _pack_experts(module)
    for name in linears_to_pack(model):
        weights[name] = _pack_linear(model, name)
    quantize_model(model)  # checks that nothing is left, and freezes
    return AddedError.of(weights, before_BSV=before_BSV, after_BSV=_logits(model, ids_BS), random_text=random_text)


def _pack_experts(experts: ChannelExperts) -> float:
    dense = {name: experts.projection(name) for name in PROJECTIONS}
    pack_experts(experts)
    squares = torch.zeros(2, dtype=torch.float64)
    for name, rows in dense.items():
        packed = experts.projection(name)
        for start in range(0, rows.shape[0], _ROWS):
            stop = min(start + _ROWS, rows.shape[0])
            squares += _squares(*(one.rows(start, stop, torch.float32) for one in (rows, packed)))
    return _relative(squares)


def _pack_linear(model: PreTrainedModel, name: str) -> float:
    linear = cast(nn.Linear, model.get_submodule(name))
    model.set_submodule(name, pack_linear(linear))
    return _relative(_squares(dense_weight(linear), dense_weight(model.get_submodule(name))))


def _squares(exact: Tensor, rounded: Tensor) -> Tensor:
    """Sums of squares of the difference and of the exact values: float64 `[2]`."""
    return torch.stack([(exact - rounded).square().sum(), exact.square().sum()]).double().cpu()


def _relative(squares: Tensor) -> float:
    error, total = squares.sqrt().tolist()
    return error / total if total else 0.0


def _random_ids(model: PreTrainedModel) -> Tensor:
    vocab_size = int(model.config.get_text_config().vocab_size)
    return torch.randint(0, vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))


def _logits(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    """fp32, in eval mode."""
    was_training = model.training
    logits_BSV = model.eval()(input_ids=ids_BS.to(model.device), use_cache=False).logits
    model.train(was_training)
    return logits_BSV.float().cpu()
