"""The script that writes random checkpoints in the exact shape of large models."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoTokenizer, MixtralConfig, Qwen3MoeConfig

from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import load_model
from scripts import make_synthetic_checkpoint as script

SMALL = {"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN = Qwen3MoeConfig(
    **SMALL, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96
)
MIXTRAL = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, intermediate_size=128)


def write(out, config=QWEN, *, fp8=False, seed=0, shard_bytes=1e5):
    script.write_checkpoint(out, config=config, dtype=torch.bfloat16, fp8=fp8, seed=seed, shard_bytes=shard_bytes)
    return out


def tensors_of(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_the_default_is_qwen3_30b_a3b_with_fewer_layers():
    tensors = script.stored_tensors(script.read_config(None, num_layers=2), dtype=torch.bfloat16, fp8=False)
    size = {tensor.name: tensor.num_bytes for tensor in tensors}
    experts = 128 * 3 * 768 * 2048 * 2
    attention = (2 * 32 + 2 * 4) * 128 * 2048 * 2
    small = (128 * 2048 + 2 * 2048 + 2 * 128) * 2  # router and norms
    for index in range(2):
        assert sum(b for name, b in size.items() if f".layers.{index}." in name) == experts + attention + small
    assert size["model.embed_tokens.weight"] == size["lm_head.weight"] == 151936 * 2048 * 2
    assert size["model.layers.1.mlp.experts.127.down_proj.weight"] == 2048 * 768 * 2
    assert len(size) == 2 * (128 * 3 + 4 + 1 + 4) + 3


@pytest.mark.parametrize("config", [QWEN, MIXTRAL], ids=["qwen3", "mixtral"])
def test_a_checkpoint_loads_gives_finite_logits_and_uses_all_experts(config, tmp_path):
    model = load_model(str(write(tmp_path / "made", config)))
    assert model.dtype == torch.bfloat16
    counts = torch.zeros(moe_layers(model)[0].experts.get_parameter("down_proj").shape[0])

    def count(module, arguments):
        counts.index_add_(0, arguments[1].flatten(), torch.ones(arguments[1].numel()))

    hook = moe_layers(model)[0].experts.register_forward_pre_hook(count)
    with torch.no_grad():
        logits = model(torch.arange(512).view(4, 128)).logits.float()
    hook.remove()
    assert logits.isfinite().all()
    assert 0.1 < float(logits.std()) < 10
    assert bool((counts > 0).all())
    assert AutoTokenizer.from_pretrained(tmp_path / "made")("a word")["input_ids"]


def test_shards_hold_what_the_index_says_and_values_depend_on_seed_and_name_alone(tmp_path):
    many, one, other = (
        write(tmp_path / name, shard_bytes=size, seed=seed)
        for name, size, seed in [("many", 1e5, 0), ("one", 1e9, 0), ("other", 1e9, 1)]
    )
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(many.glob("*.safetensors"))) > 5
    for file in many.glob("*.safetensors"):
        assert {name for name, own in index["weight_map"].items() if own == file.name} == set(load_file(file))
    first, second = tensors_of(many), tensors_of(one)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in first.values())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert not torch.equal(first[name], tensors_of(other)[name])


def test_channels_differ_in_size(tmp_path):
    down = tensors_of(write(tmp_path / "made"))["model.layers.0.mlp.experts.0.down_proj.weight"].float()
    norms_C = down.norm(dim=0)
    assert float(norms_C.max() / norms_C.min()) > 4


def test_fp8_blocks_stand_for_the_16_bit_weights(tmp_path):
    config = Qwen3MoeConfig(**(QWEN.to_dict() | {"moe_intermediate_size": 200}))  # not a multiple of 128
    plain = tensors_of(write(tmp_path / "plain", config))
    folder = write(tmp_path / "fp8", config, fp8=True)
    packed = tensors_of(folder)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["weight_block_size"]) == ("fp8", [128, 128])
    assert packed["lm_head.weight"].dtype == packed["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    codes, scale = packed[name], packed[f"{name}_scale_inv"]
    assert codes.dtype == torch.float8_e4m3fn
    assert tuple(scale.shape) == (2, 1)  # 200 x 64 in blocks of 128 x 128
    weight = codes.float() * scale.float().repeat_interleave(128, 0)[:200]
    # Three bits of mantissa, and bfloat16 of the plain one.
    torch.testing.assert_close(weight, plain[name].float(), rtol=2**-4 + 2**-7, atol=float(scale.max()) * 2**-9)
    assert F.cosine_similarity(weight.flatten(), plain[name].float().flatten(), dim=0) > 0.999


def test_a_folder_that_is_there_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="is there already: delete it, or choose another --out"):
        script.main()
