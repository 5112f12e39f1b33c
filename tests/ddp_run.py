"""A recovery run on two processes (started by `test_callbacks_ddp.py`): FOLDER with text and a model."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from lightning import seed_everything  # noqa: E402
from tiny_runs import quiet_trainer, text_module  # noqa: E402

from callbacks import ChannelPruning, CompressionReport, ExpertCalibration, ExportPruned, Recovery  # noqa: E402
from lightning_moe.adapters.inject import AdapterConfig  # noqa: E402
from lightning_moe.files import write_json  # noqa: E402
from lightning_moe.training.module import RecoveryModule  # noqa: E402


def main(folder):
    seed_everything(0, verbose=False)
    module = RecoveryModule(source=str(folder / "model"), gradient_checkpointing=False)
    pruning = ChannelPruning(prune_ratio=0.5, method_args={"align": 8})
    callbacks = [
        ExpertCalibration(),
        pruning,
        Recovery(adapter=AdapterConfig(expert_rank=2, router_rank=2)),
        ExportPruned(folder=str(folder / "exports")),
        CompressionReport(folder=str(folder / "results"), name="two"),
    ]
    trainer = quiet_trainer(callbacks, strategy="ddp", devices=2)
    trainer.fit(module, datamodule=text_module(folder))
    trained = {name: p.double().sum().item() for name, p in module.named_parameters() if p.requires_grad}
    seen = {"trained": trained, "plan": pruning.plans[0].digest}
    write_json(folder / f"rank{trainer.global_rank}.json", seen)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
