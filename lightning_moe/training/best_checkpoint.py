"""Back to the best validated weights when training ends, early or not."""

import logging
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_moe.models.discovery import find_language_model
from lightning_moe.surgery.structure import structure_of
from lightning_moe.training.checkpoint import noted_structure
from lightning_moe.training.checkpoint_files import read_checkpoint

log = logging.getLogger(__name__)


def check_best(trainer: Trainer) -> None:
    """Runs before training: there will be a best checkpoint, and it can be loaded.

    Raises:
        ValueError: no ModelCheckpoint monitors a metric, nothing is validated, or the weights are sharded.
    """
    if _keeper(trainer) is None:
        raise ValueError(
            "`restore_best` needs a ModelCheckpoint with a `monitor`, such as `nll`, in `trainer.callbacks` and "
            "`trainer.enable_checkpointing: true`, as in configs/early_stopping.yaml."
        )
    if not trainer.enable_validation:
        raise ValueError(
            f"`restore_best` needs validation during training: give `data.validation` corpora and set "
            f"`trainer.limit_val_batches`, now {trainer.limit_val_batches}, above 0."
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            "`restore_best` loads whole weights, and ModelParallelStrategy shards them. Leave it out; the best "
            "checkpoint is kept on disk all the same."
        )


def restore_best(trainer: Trainer, *, module: LightningModule) -> None:
    """Loads the weights of the best checkpoint; the last ones stay where there is none, or the model was cut since."""
    kept = _keeper(trainer)
    if kept is None or not Path(kept.best_model_path).is_file():
        log.warning("No best checkpoint was saved before training ended: the last weights stay.")
        return
    checkpoint = read_checkpoint(kept.best_model_path)
    noted = noted_structure(checkpoint)
    if noted is not None and noted.to_dict() != structure_of(find_language_model(module)).to_dict():
        log.warning(
            "The best checkpoint '%s', of step %d, was written before the model was cut further, and its weights do "
            "not fit: the last weights stay. Begin to validate after the last cut to go back to the best after it.",
            kept.best_model_path,
            checkpoint["global_step"],
        )
        return
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    log.info("Weights of step %d: %s was %.4f.", checkpoint["global_step"], kept.monitor, kept.best_model_score)


def _keeper(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback that keeps the best checkpoint."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            return callback
    return None
