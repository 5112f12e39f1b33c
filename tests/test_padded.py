"""Padded exports: stock checkpoints that load without this package and give the same logits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from random_plans import random_plan, uniform_plan
from safetensors.torch import load_file, save_file
from tiny_models import MODEL_NAMES, random_tokens, tiny_model
from transformers import PreTrainedModel

from lightning_moe.export.padded import export_padded
from lightning_moe.files import folder_bytes
from lightning_moe.models.discovery import model_shape, moe_layers
from lightning_moe.models.families import family_of
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan

# Loads every folder with stock transformers and compares logits; prints the largest difference.
_STOCK_PROGRAM = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], (folder, report)
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model(input_ids=expected["ids"], use_cache=False).logits
    difference = (logits - expected["logits"]).abs().max()
    assert difference < 1e-4, (folder, difference)
    print(folder.name)
assert not [name for name in sys.modules if name.split(".")[0] == "lightning_moe"]
"""


def cut_model(name: str, *, evicted: Any = (), seed: int = 0, **overrides: Any) -> PreTrainedModel:
    if name.endswith("_grouped"):
        overrides |= {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    model = tiny_model(name, **overrides)
    apply_plan(model, plan=random_plan(model, evicted=evicted, seed=seed))
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=random_tokens(), use_cache=False).logits


def export_with_logits(model: PreTrainedModel, folder: Path) -> None:
    export_padded(model, folder)
    save_file({"ids": random_tokens(), "logits": logits_of(model)}, folder / "expected.safetensors")


def test_stock_transformers_loads_them_and_gives_the_same_logits(tmp_path) -> None:
    native = [name for name in MODEL_NAMES if name != "deepseek"]
    for name in native:
        export_with_logits(cut_model(name), tmp_path / name)
        if name != "deepseek_v2_grouped":
            export_with_logits(cut_model(name, evicted=((1,), (6,))), tmp_path / f"{name}_evicted")
    for name in ("deepseek_v3", "deepseek_v3_grouped", "glm4_moe"):
        export_with_logits(cut_model(name, evicted=((1,), (0, 6))), tmp_path / f"{name}_unequal")
    packed = cut_model("qwen2_moe")
    quantize_model(packed)
    export_with_logits(packed, tmp_path / "qwen2_moe_packed")
    command = [sys.executable, "-c", _STOCK_PROGRAM, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.split()) == 2 * len(native) - 1 + 3 + 1


@pytest.mark.parametrize("name", ["deepseek", "deepseek_v2", "ernie4_5_moe"])
def test_families_that_derive_their_shared_width_load_here_too(name, tmp_path) -> None:
    model = cut_model(name, evicted=((2,), (3,)))
    export_padded(model, tmp_path / "padded")
    loaded = load_model(str(tmp_path / "padded"))
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-4, atol=1e-5)
    assert {layer.num_experts for layer in model_shape(loaded).layers} == {7}


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_plan_of_one_width_gives_the_smaller_uniform_checkpoint(name, tmp_path) -> None:
    stock = tiny_model(name)
    stock.save_pretrained(tmp_path / "stock")
    apply_plan(stock, plan=uniform_plan(stock, width=8))
    export_padded(stock, tmp_path / "uniform")
    config = json.loads((tmp_path / "uniform" / "config.json").read_text())
    family = family_of(stock.config)
    assert getattr(load_model(str(tmp_path / "uniform")).config, family.expert_width) == 8
    assert "quantization_config" not in config
    assert config["architectures"] == [type(stock).__name__]
    stored = [folder_bytes(tmp_path / folder) for folder in ("uniform", "stock")]
    removed = 2 * 3 * 8 * 24 * 64 * 4  # layers, projections, experts, channels, hidden, bytes
    assert stored[1] - stored[0] == pytest.approx(removed, rel=0.05)


def test_the_widest_expert_sets_the_width_of_all(tmp_path) -> None:
    model = cut_model("qwen3_moe")
    widest = max(max(layer.widths) for layer in model_shape(model).layers)
    export_padded(model, tmp_path / "padded")
    loaded = load_model(str(tmp_path / "padded"))
    assert widest % 8
    assert loaded.config.moe_intermediate_size == 8 * (widest // 8 + 1)
    layer, cut = moe_layers(loaded)[0], moe_layers(model)[0].experts
    gate_EnH, up_EnH = layer.experts.get_parameter("gate_up_proj").chunk(2, dim=1)
    width = cut.widths[3]
    assert torch.equal(gate_EnH[3, :width], cut.expert_matrices(3, dtype=torch.float32)[0])
    assert up_EnH[3, width:].abs().sum() == 0
    assert layer.experts.get_parameter("down_proj")[3, :, width:].abs().sum() == 0


def test_files_are_published_names_with_an_index(tmp_path) -> None:
    export_padded(cut_model("qwen3_moe"), tmp_path / "padded")
    index = json.loads((tmp_path / "padded" / "model.safetensors.index.json").read_text())
    assert "model.layers.0.mlp.experts.7.down_proj.weight" in index["weight_map"]
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    tensors = {name: value for shard in shards for name, value in load_file(tmp_path / "padded" / shard).items()}
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())


def test_bfloat16_and_tied_embeddings_are_kept(tmp_path) -> None:
    model = cut_model("qwen3_moe", tie_word_embeddings=True, dtype=torch.bfloat16)
    export_padded(model, tmp_path / "padded")
    loaded = load_model(str(tmp_path / "padded"))
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["qwen3_moe", "ernie4_5_moe", "mixtral"])
def test_unequal_evictions_are_refused_without_a_bias_on_sigmoid_scores(name, tmp_path) -> None:
    model = cut_model(name, evicted=((1,), (2, 3)))
    with pytest.raises(
        ValueError, match=r"layers kept 6 to 7 experts\. .* Export `ragged`, or plan so that .*floor: 16"
    ):
        export_padded(model, tmp_path / "padded")
    assert not (tmp_path / "padded").exists()


def test_masked_experts_without_a_bias_are_refused(tmp_path) -> None:
    model = cut_model("deepseek_v2_grouped", evicted=((1,), (6,)))
    with pytest.raises(ValueError, match="lost experts behind a grouped router without selection bias"):
        export_padded(model, tmp_path / "padded")


def test_a_folder_of_something_else_is_not_replaced(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than a model"):
        export_padded(cut_model("qwen3_moe"), tmp_path)
