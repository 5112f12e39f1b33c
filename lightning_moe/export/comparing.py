"""Whether an export that was loaded again is the model that was saved.  B sequences, S tokens, V words, K experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.export.place import NotReproducedError
from lightning_moe.models.discovery import expert_widths, moe_layers
from lightning_moe.models.families import is_moe

# Largest difference allowed, as a share of the largest logit: where storing rounds, and where it does not.
_ROUNDED, _EXACT = 5e-2, 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A model's answer to fixed random tokens.

    Args:
        logits_BSV: In fp32.
        chosen: Per MoE layer, the experts of each token `[B * S, K]`, ascending.
        num_experts: Per MoE layer, how many there are to choose from.
    """

    logits_BSV: Tensor
    chosen: tuple[Tensor, ...]
    num_experts: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> Self:
        """Two sequences of 32 tokens through the model, in eval mode."""
        config = model.config.get_text_config()
        ids = torch.randint(0, int(config.vocab_size), (2, 32), generator=torch.Generator().manual_seed(0))
        was_training = model.training
        with _choices(model) as chosen:
            logits = model.eval()(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
        model.train(was_training)
        layers = moe_layers(model) if is_moe(model.config) else []
        num_experts = tuple(len(expert_widths(layer.experts)) for layer in layers)
        return cls(logits_BSV=logits, chosen=tuple(chosen), num_experts=num_experts)


@contextmanager
def _choices(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What the routers choose inside the block, one entry per MoE layer."""
    chosen: list[Tensor] = []
    layers = moe_layers(model) if is_moe(model.config) else []
    hooks = [layer.router.register_forward_hook(partial(_note, chosen)) for layer in layers]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def _note(chosen: list[Tensor], router: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    chosen.append(outputs[2].detach().cpu().sort(-1).values)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far two models are apart on the same tokens.

    A token whose choice of experts was close may go to another expert when weights are rounded, and its logits then
    differ by more than the rounding itself. So the largest difference alone says little: the median and the share of
    such tokens stand beside it.

    Args:
        max_logit_diff: Largest difference of a logit.
        median_logit_diff: The median over tokens of each token's largest difference.
        rerouted: Share of tokens that go to other experts in some layer; None where the models count their experts
            differently.
    """

    max_logit_diff: float
    median_logit_diff: float
    rerouted: float | None

    @classmethod
    def of(cls, before: Probe, after: Probe) -> Self:
        """Of the model before and after the reload."""
        difference_BS = (after.logits_BSV - before.logits_BSV).abs().amax(-1)
        moved = [(one != other).any(-1) for one, other in zip(before.chosen, after.chosen, strict=True)]
        known = moved and before.num_experts == after.num_experts
        return cls(
            max_logit_diff=float(difference_BS.max()),
            median_logit_diff=float(difference_BS.median()),
            rerouted=float(torch.stack(moved).any(0).float().mean()) if known else None,
        )

    def check(self, base: Path, *, before: Probe, rounded: bool) -> None:
        """Judges the median where storing rounds, and otherwise the largest difference.

        Raises:
            NotReproducedError: it is more than a share of the largest logit.
        """
        judged = self.median_logit_diff if rounded else self.max_logit_diff
        allowed = float(before.logits_BSV.abs().max()) * (_ROUNDED if rounded else _EXACT)
        if not judged <= allowed:
            raise NotReproducedError(
                f"The export '{base}' does not reproduce the model: logits differ by {judged:.3g}, allowed "
                f"{allowed:.3g}. It is left there for inspection; do not ship it."
            )

    def describe(self) -> str:
        """In words."""
        moved = "" if self.rerouted is None else f", {self.rerouted:.1%} of tokens go to other experts"
        return (
            f"largest logit difference after reload {self.max_logit_diff:.1e} (median over tokens "
            f"{self.median_logit_diff:.1e}{moved})"
        )


def check_tensors(base: Path, *, expected: PreTrainedModel, found: PreTrainedModel) -> None:
    """Every tensor of the reload is the one that was saved, up to the rounding of its stored type.

    Raises:
        NotReproducedError: one is missing or differs; the message names it.
    """
    saved, reloaded = (dict(model.named_parameters()) | dict(model.named_buffers()) for model in (expected, found))
    for name in sorted(saved.keys() | reloaded.keys()):
        if name not in saved or name not in reloaded or not _equal_up_to_rounding(saved[name], reloaded[name]):
            raise NotReproducedError(
                f"The export '{base}' does not reproduce the model: '{name}' differs after the reload. It is left "
                "there for inspection; do not ship it."
            )


def _equal_up_to_rounding(saved: Tensor, reloaded: Tensor) -> bool:
    """bfloat16 keeps 8 bits, float16 11 bits down to 6e-8; packed codes must be equal."""
    saved, reloaded = saved.detach().cpu(), reloaded.detach().cpu()
    if saved.shape != reloaded.shape or not saved.is_floating_point():
        return torch.equal(saved, reloaded)
    return torch.allclose(saved.float(), reloaded.float(), rtol=2**-7, atol=1e-6, equal_nan=True)


def check_stock_classes(base: Path, model: PreTrainedModel) -> None:
    """A stock export must not lean on this package, which happens to be imported while it is compared.

    Raises:
        NotReproducedError: a part of the model is a class of ours.
    """
    ours = [name or "the model" for name, module in model.named_modules() if _package_of(module) == "lightning_moe"]
    if ours:
        raise NotReproducedError(
            f"The export '{base}' does not load without `import lightning_moe`: '{ours[0]}' is of this package. It is "
            "left there for inspection; do not ship it."
        )


def _package_of(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]
