"""When to cut: a validated list of (step, prune_ratio)."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.routers import without_adapter
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import cut_layer


@dataclass(frozen=True, kw_only=True)
class PruneSchedule:
    """Cuts during training.

    Args:
        cuts: (optimizer step, share of the *unpruned* model's channels removed from then on), both ascending.

    Raises:
        ValueError: empty, not ascending, or a ratio outside (0, 1).
    """

    cuts: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        steps, ratios = [step for step, _ in self.cuts], [ratio for _, ratio in self.cuts]
        if not self.cuts or steps != sorted(set(steps)) or ratios != sorted(set(ratios)):
            raise ValueError(f"`schedule` must be [step, prune_ratio] pairs, both strictly ascending, got {self.cuts}.")
        if steps[0] < 0 or ratios[0] <= 0 or ratios[-1] >= 1:
            raise ValueError(f"`schedule` needs steps >= 0 and prune ratios inside (0, 1), got {self.cuts}.")

    def due(self, *, step: int, num_done: int) -> tuple[int, float] | None:
        """(cuts done after this one, its prune ratio) if one is due at `step`, else None; overdue ones are skipped."""
        reached = [index for index, (at, _) in enumerate(self.cuts) if at <= step]
        if not reached or reached[-1] < num_done:
            return None
        return reached[-1] + 1, self.cuts[reached[-1]][1]

    def check_trainer(self, *, num_devices: int) -> None:
        """Refuses what scheduled cuts do not support yet.

        Raises:
            ValueError: more than one process.
        """
        if num_devices > 1:
            raise ValueError(
                f"Scheduled cuts run on one device, got {num_devices}. Use `prune_ratio` (one cut before training), "
                "which works under every strategy."
            )


def check_trainable(model: PreTrainedModel) -> None:
    """Refuses models whose weights themselves are not trained: scheduled cuts follow optimizers of plain parameters.

    Raises:
        ValueError: experts are packed in 4 bit, or adapters are around them or their router.
    """
    for layer in moe_layers(model):
        if isinstance(layer.base_experts, ChannelExperts) and layer.base_experts.packed:
            raise ValueError(f"'{layer.name}' is in 4 bit, and `schedule` cuts weights in training. Use `prune_ratio`.")
        if layer.experts is not layer.base_experts or without_adapter(layer.router) is not layer.router:
            raise ValueError(f"'{layer.block_name}' has adapters, and `schedule` cuts bare weights. Use `prune_ratio`.")


def replay_cuts(model: PreTrainedModel, *, plans: Sequence[PrunePlan]) -> None:
    """Gives a freshly loaded model the structure it had after these cuts; the weights come from a checkpoint then."""
    for plan in plans:
        for layer in moe_layers(model):
            cut_layer(layer, keep_C=plan.keep[layer.index])
