"""When to cut: a validated list of (step, prune_ratio)."""

from dataclasses import dataclass


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
