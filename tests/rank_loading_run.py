"""Recoveries of pruned folders in two processes (started by `test_rank_loading.py`): FOLDER CASE..., results by rank.

A case is `STRATEGY-SOURCE-QUANTIZE`, with `-whole` where rows must not wait for the shards, and `+resumed` where the
run goes on from its second step too. QUANTIZE `all` trains the model itself, without adapters.
"""

import os
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
from lightning import Callback, seed_everything  # noqa: E402
from recovery_runs import Watch, strategy_of  # noqa: E402
from tiny_runs import loader_of, quiet_trainer, token_batches  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from callbacks import ExportPruned, Recovery  # noqa: E402
from lightning_moe.adapters.inject import AdapterConfig  # noqa: E402
from lightning_moe.training.module import LanguageModelModule, RecoveryModule  # noqa: E402

ADAPTER = AdapterConfig(expert_rank=2, router_rank=2, attention_rank=2, train_norms=True)


class LoadWhole(Callback):
    """Any callback before Recovery that asks for the model gets it whole."""

    def setup(self, trainer, pl_module, stage):
        pl_module.load_language_model()


class Losses(Callback):
    """Of every batch; and, before training, which rows are on the meta device and what is a shard."""

    def __init__(self):
        self.seen = []
        self.waiting = None
        self.parameters = {}

    def setup(self, trainer, pl_module, stage):
        self.waiting = sum(parameter.is_meta for parameter in pl_module.parameters())

    def on_fit_start(self, trainer, pl_module):
        for name, parameter in pl_module.named_parameters():
            value = parameter.detach()
            self.parameters[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


def module_of(source, *, quantize):
    if quantize == "all":
        return LanguageModelModule(source=str(source), learning_rate=1e-3)
    return RecoveryModule(source=str(source), expert_learning_rate=1e-2, router_learning_rate=1e-3)


def run(folder, case, *, resume=None):
    strategy, source, quantize, *more = case.split("-")
    source += os.environ["RANK"] if source == "by_rank" else ""  # each process another folder
    seed_everything(0, verbose=False)
    module = module_of(folder / source, quantize=quantize)
    name = case + ("" if resume is None else "_resumed")
    losses, watch = Losses(), Watch(folder / name)
    chain = [LoadWhole()] if more else []
    chain += [] if quantize == "all" else [Recovery(quantize=quantize, adapter=ADAPTER)]
    chain += [losses, watch]
    if resume is not None:
        chain += [ExportPruned(folder=str(folder / "exports"), formats=["merged_nf4"])]
    settings = {"strategy": strategy_of(strategy, size=2), "devices": 2, "enable_checkpointing": True, "max_steps": 4}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*exists and is not empty.*")
        trainer = quiet_trainer(chain, **settings)
        trainer.fit(module, train_dataloaders=loader_of(token_batches(8)), ckpt_path=resume)
    found = {"losses": losses.seen, "waiting": losses.waiting, "parameters": losses.parameters}
    return found | {"trained": watch.trained, "sent": sent(trainer)}, trainer


def sent(trainer):
    """Names of the parameters that DDP sent to all processes as it began; none under FSDP2."""
    module = trainer.strategy.lightning_module
    left_out = vars(module).get("_ddp_params_and_buffers_to_ignore", [])
    return sorted(name for name, _ in module.named_parameters() if name not in left_out)


def main(folder, cases):
    results = {}
    for case in cases:
        name, _, resumed = case.partition("+")
        results[name], trainer = run(folder, name)
        if resumed:
            results[case], trainer = run(folder, name, resume=str(folder / name / "step=2.ckpt"))
    torch.save(results, folder / f"{cases[0]}_rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
