"""One NF4 + DoRA recovery, on one process or several: the same global batches, so the same result."""

import warnings

from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny_runs import quiet_trainer, text_module
from torch.distributed.tensor import DTensor

from callbacks import ChannelPruning, ExpertCalibration, Recovery
from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.training.module import RecoveryModule

NUM_STEPS = 4
ADAPTER = AdapterConfig(expert_rank=2, router_rank=2, attention_rank=2)


class Watch(ModelCheckpoint):
    """Checkpoints at step 2 and 4, and what was trained, whole, at the end."""

    def __init__(self, folder):
        super().__init__(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        self.trained = {}
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.seen += batch["input_ids"].tolist()

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                value = parameter.detach()
                self.trained[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def strategy_of(name, *, size, distributed_checkpoint=False):
    if name != "fsdp2":
        return name
    return ModelParallelStrategy(
        data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=distributed_checkpoint
    )


def recover(folder, *, name, strategy="auto", size=1, resume=None, callbacks=(), in_shards=False, **overrides):
    """What was trained, read and measured; checkpoints in `folder/name`. The global batch is 8 rows."""
    seed_everything(0, verbose=False)
    module = RecoveryModule(source=str(folder / "model"), expert_learning_rate=1e-2, router_learning_rate=1e-3)
    watch = Watch(folder / name)
    chain = [
        ExpertCalibration(),
        ChannelPruning(prune_ratio=0.5, method_args={"align": 8}),
        Recovery(adapter=ADAPTER),
        *callbacks,
        watch,
    ]
    settings = {
        "strategy": strategy_of(strategy, size=size, distributed_checkpoint=in_shards),
        "devices": size,
        "max_steps": NUM_STEPS,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "enable_checkpointing": True,
        "limit_val_batches": 1.0,
        "val_check_interval": 2 * NUM_STEPS,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*exists and is not empty.*")
        trainer = quiet_trainer(chain, **settings | overrides)
        trainer.fit(module, datamodule=text_module(folder, batch_size=8 // size), ckpt_path=resume)
    nll = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("nll")}
    return {"trained": watch.trained, "seen": watch.seen, "nll": nll}, trainer
