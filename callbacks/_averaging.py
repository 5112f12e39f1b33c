"""Lightning's callbacks that average weights hold a copy of the module: where that goes with ours."""

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from callbacks._trainer import callbacks_of


def check_averaging(trainer: Trainer, callback: Callback, *, scheduled: bool = False, packed: bool = False) -> None:
    """Refuses weight averaging where its copy of the model would not fit the one that is trained.

    Args:
        trainer: the running trainer.
        callback: the one of ours that changes the model.
        scheduled: it cuts the model during training.
        packed: it packs weights in 4 bit.

    Raises:
        ValueError: the copy gets another shape, is made too early, or is an average of the codes of 4-bit weights.
    """
    callbacks = callbacks_of(trainer)
    for position, other in enumerate(callbacks):
        if not isinstance(other, StochasticWeightAveraging | WeightAveraging):
            continue
        name = type(other).__name__
        if scheduled:
            raise ValueError(
                f"{name} averages weights of one shape, and `schedule` changes it in training. Cut once before "
                "training (`prune_ratio`), or average in a second run, after the last cut."
            )
        if position < callbacks.index(callback):
            raise ValueError(
                f"{name} must stand after {type(callback).__name__} in `trainer.callbacks`: it copies the model as it "
                "finds it."
            )
        if packed and isinstance(other, WeightAveraging):
            raise ValueError(
                f"{name} would average the codes of 4-bit weights as if they were numbers. Use "
                "StochasticWeightAveraging, which leaves equal values as they are, or `quantize: none`."
            )
