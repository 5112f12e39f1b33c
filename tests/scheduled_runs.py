"""Somebody's training with cuts at steps 2 and 4, on one process or several: the same global batches."""

import warnings
import weakref

import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from tiny_models import tiny_model
from tiny_runs import ForeignData, ForeignModule, quiet_trainer, token_batches
from torch.utils.data import DataLoader

from callbacks import ChannelPruning, ExpertCalibration
from lightning_moe.calibration.processes import Processes
from lightning_moe.training.rank_shard import RankShard

NUM_STEPS = 6


class Stream(torch.utils.data.IterableDataset):
    """Rows of text, one less than makes whole rounds; a resumed run goes on after `skip` rows."""

    def __init__(self, skip):
        super().__init__()
        batches = token_batches(NUM_STEPS * 4 + 2)
        self.rows = [{name: value[row] for name, value in batch.items()} for batch in batches for row in (0, 1)][
            skip:-1
        ]

    def __iter__(self):
        yield from self.rows


class Data(ForeignData):
    """Shares of a stream; 4 rows a batch in all."""

    def __init__(self, *, size, skip):
        super().__init__(None)
        self.size = size
        self.skip = skip

    def train_dataloader(self):
        processes = Processes(rank=self.trainer.global_rank, size=self.trainer.world_size)
        return DataLoader(RankShard(Stream(self.skip), processes=processes), batch_size=4 // self.size)


class Wrappers(ModelCheckpoint):
    """Checkpoints, and the DDP wrapper at each step: the old one must be gone once there is a new one."""

    def __init__(self, folder):
        super().__init__(dirpath=folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        self.wrappers = []
        self.num_alive = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        wrapper = trainer.strategy.model
        if not any(known() is wrapper for known in self.wrappers):
            self.wrappers.append(weakref.ref(wrapper))
        self.num_alive.append(sum(known() is not None for known in self.wrappers))


def train(folder, *, size=1, resume=None):
    seed_everything(0, verbose=False)
    watch = Wrappers(folder)
    pruning = ChannelPruning(schedule=[(2, 0.25), (4, 0.5)], method_args={"align": 8})
    strategy = DDPStrategy(find_unused_parameters=True, process_group_backend="gloo") if size > 1 else "auto"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*exists and is not empty.*")
        trainer = quiet_trainer(
            [ExpertCalibration(window=2), pruning, watch],
            strategy=strategy,
            devices=size,
            max_steps=NUM_STEPS,
            accumulate_grad_batches=2,
            enable_checkpointing=True,
        )
        module = ForeignModule(model=tiny_model(num_hidden_layers=2))
        trainer.fit(module, datamodule=Data(size=size, skip=24 if resume else 0), ckpt_path=resume)
    rows = [row.tolist() for batch in module.seen for row in batch]
    parameters = {name: value.detach().clone() for name, value in module.named_parameters()}
    found = {
        "parameters": parameters,
        "seen": rows,
        "plans": [plan.digest for plan in pruning.plans],
        "wrappers": len(watch.wrappers),
        "alive": watch.num_alive,
        "find_unused": size == 1 or trainer.strategy._ddp_kwargs["find_unused_parameters"],
    }
    return found, trainer
