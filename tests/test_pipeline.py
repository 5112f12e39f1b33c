"""Every family through the whole job: calibrate, plan, cut, repair, NF4, DoRA step, save, reload, merge."""

import pytest
import torch
from tiny_models import MODEL_NAMES, VOCAB_SIZE, tiny_model

from lightning_moe.adapters.groups import trainable_groups
from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.allocation import build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.export.deploy import export_model
from lightning_moe.models.discovery import expert_widths, model_shape, moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.repair import plan_repair


def batches(*, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (4, 4, 24), generator=generator)
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch} for batch in ids]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_whole_job(name, tmp_path):
    model = tiny_model(name, seed=0)
    loaders = {"one": batches(seed=1), "two": batches(seed=2)}
    statistics = collect_statistics(model, loaders=loaders, progress=False)
    statistics.save(tmp_path / "statistics.safetensors")
    statistics = CalibrationStatistics.load(tmp_path / "statistics.safetensors")

    method = build_method("exact_global", align=8, protect_super_experts=False)
    plan = method.plan(statistics, prune_ratio=0.5)
    plan.save(tmp_path / "plan.json")
    plan = PrunePlan.load(tmp_path / "plan.json")
    assert plan.num_kept == plan.shape.num_channels // 2

    repair = plan_repair(model, plan=plan, loaders=loaders, progress=False)
    apply_plan(model, plan=plan, repair=repair)
    assert sum(sum(expert_widths(layer.experts)) for layer in moe_layers(model)) == plan.num_kept

    quantize_model(model)
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=4, router_rank=2))
    groups = trainable_groups(model)
    optimizer = torch.optim.AdamW([parameter for group in groups.values() for parameter in group], lr=1e-2)
    before = {name: [parameter.detach().clone() for parameter in group] for name, group in groups.items()}
    loss = peft_model(**loaders["one"][0], use_cache=False).loss
    loss.backward()
    optimizer.step()
    for group, parameters in groups.items():
        moved = [not torch.equal(old, new) for old, new in zip(before[group], parameters, strict=True)]
        assert any(moved), group
    assert peft_model(**loaders["one"][0], use_cache=False).loss < loss

    results = export_model(model, folder=tmp_path, formats=["adapter", "merged_nf4"], peft_model=peft_model)
    assert [result.format for result in results] == ["adapter", "merged_nf4"]
    reloaded = load_model(results[1].base, dtype="float32")
    assert reloaded.generate(loaders["one"][0]["input_ids"][:, :5], max_new_tokens=3, do_sample=False).shape == (4, 8)
    assert [layer.widths for layer in model_shape(reloaded).layers] == [
        layer.widths for layer in model_shape(load_model(results[0].base)).layers
    ]
