"""ExportPruned, CompressionReport and RouterMonitor at the end of our own recovery, under the Trainer's settings."""

import json
import math

import pytest
import torch
from lightning import Callback
from tiny_runs import quiet_trainer, save_model, save_text, text_module

from callbacks import ChannelPruning, CompressionReport, ExpertCalibration, ExportPruned, Recovery, RouterMonitor
from lightning_moe.quantization.linears import pack_linear
from lightning_moe.training.module import RecoveryModule


def pipeline(folder):
    return [
        ExpertCalibration(),
        ChannelPruning(prune_ratio=0.5, repair=False),
        Recovery(),
        RouterMonitor(folder=str(folder / "router"), every_n_steps=1),
        ExportPruned(folder=str(folder / "export"), formats=["merged_nf4"]),
        CompressionReport(folder=str(folder / "report"), name="run"),
    ]


@pytest.fixture
def folder(tmp_path):
    save_text(tmp_path)
    save_model(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        {"fast_dev_run": True},
        {"barebones": True, "max_steps": 1},
        {
            "precision": "bf16-mixed",
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.5,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 1,
        },
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.filterwarnings("ignore:.*barebones.*")
def test_everything_is_written(folder, settings):
    module, callbacks = RecoveryModule(source=str(folder / "model")), pipeline(folder)
    quiet_trainer(callbacks, **settings).fit(module, datamodule=text_module(folder))
    (exported,) = callbacks[4].results
    assert exported.max_logit_diff < 1e-3
    row = json.loads((folder / "report" / "stages" / "run_merged.json").read_text(encoding="utf-8"))
    assert math.isfinite(row["nll"])
    assert row["prune_ratio"] == 0.5
    tables = json.loads((folder / "router" / "router.json").read_text(encoding="utf-8"))
    assert tables["before"]["corpora"].keys() == tables["after"]["corpora"].keys() == {"a", "b"}


def test_a_failed_run_exports_and_reports_nothing(folder):
    class Failing(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("here")

    module = RecoveryModule(source=str(folder / "model"))
    with pytest.raises(RuntimeError, match="here"):
        quiet_trainer([*pipeline(folder), Failing()]).fit(module, datamodule=text_module(folder))
    assert not any((folder / name).exists() for name in ("router", "export", "report"))


def test_validation_alone_exports_nothing_and_leaves_no_inference_tensors(folder):
    module, data = RecoveryModule(source=str(folder / "model")), text_module(folder)
    callbacks = pipeline(folder)
    trainer = quiet_trainer(callbacks, limit_val_batches=1, max_steps=1)
    trainer.validate(module, datamodule=data, verbose=False)
    assert not any((folder / name).exists() for name in ("router", "export", "report"))
    assert not any(value.is_inference() for value in module.state_dict().values())
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    trainer.fit(module, datamodule=data)
    assert any(not torch.equal(p, before[name]) for name, p in module.named_parameters() if name in before)
    assert (folder / "report" / "stages" / "run_merged.json").exists()


def test_a_packed_layer_computes_in_the_type_of_its_input():
    """Also after it was run in another one: bitsandbytes would keep the type of the first input."""
    linear = pack_linear(torch.nn.Linear(64, 64, bias=False))
    input_TH = torch.randn(3, 64)
    expected = linear(input_TH)
    fresh = pack_linear(torch.nn.Linear(64, 64, bias=False))
    fresh.load_state_dict(linear.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh(input_TH.bfloat16())
    torch.testing.assert_close(fresh(input_TH), expected, rtol=0, atol=1e-6)
