"""A comparison on a tiny model: what its tests share."""

import torch
from tiny_models import tiny_model
from tiny_runs import token_batches

from lightning_moe.evaluation.compare import Comparison, Measures

BLOCKS = {"align": 8}
LISTS = {"held": token_batches(2, seed=9), "other": token_batches(1, seed=8)}


def save_tiny(folder, *, seed=0):
    """A bfloat16 folder, so that saving in bfloat16 loses nothing."""
    tiny_model(seed=seed, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def calibration(sample):
    """Two corpora; another text for every sample."""
    return {"a": token_batches(2, seed=10 + sample), "b": token_batches(2, seed=20 + sample)}


def comparison(model, out, *, held_out=None, **overrides):
    measures = Measures(held_out=LISTS if held_out is None else held_out)
    return Comparison(source=model, calibration=calibration, measures=measures, out=out, **overrides)
