"""Memory of a recovery run from a config alone, against really adapted models and real steps."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from random_plans import uniform_plan
from tensor_peak import tensor_peak
from tiny_models import VOCAB_SIZE, random_tokens, tiny_model

from lightning_moe.adapters.groups import trainable_groups
from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.commands._sizing import answer_from_config
from lightning_moe.models.loading import read_config
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.training.losses import next_token_loss
from lightning_moe.training.memory import RecoveryMemory, RecoveryRun, optimizer_bytes
from lightning_moe.training.optim import build_optimizer

CONFIGS = Path(__file__).parent / "model_configs"
WIDTH = 16
ADAPTERS = [
    AdapterConfig(expert_rank=4, router_rank=2),
    AdapterConfig(expert_rank=2, router_rank=2, attention_rank=3, layers=[1]),
    AdapterConfig(expert_rank=2, router_rank=2, shared_expert_rank=3, train_norms=True),
]


def packed(name, **settings):
    model = tiny_model(name, dtype=torch.bfloat16, **settings)
    config = model.config
    apply_plan(model, plan=uniform_plan(model, width=WIDTH))
    quantize_model(model)
    return model, RecoveryMemory(config=config, width=WIDTH, dtype=torch.bfloat16)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["experts", "attention", "norms"])
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "deepseek_v2", "ernie4_5_moe"])
def test_adapters_are_those_that_are_injected(name, adapter):
    model, memory = packed(name)
    inject_adapters(model, config=adapter)
    counted = memory.adapted(adapter)

    def sizes(model):
        groups = trainable_groups(model)
        return {name: [(p.shape, p.dtype) for p in parameters] for name, parameters in groups.items()}

    assert sizes(counted) == sizes(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert memory.table(adapter).adapters == sum(p.numel() * p.itemsize for p in trained)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "granitemoe"])
def test_the_base_is_what_lies_in_memory(name):
    model, memory = packed(name)
    tensors = [*model.parameters(), *model.state_dict().values()]
    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            tensors += [state.absmax, state.code, state.state2.absmax, state.state2.code]
    held = {tensor.data_ptr(): tensor.numel() * tensor.itemsize for tensor in tensors if tensor.numel()}
    # A state dict makes new tensors of the descriptions, and one table serves all layers.
    linears = sum(isinstance(module, Linear4bit) for module in model.modules())
    assert memory.base == pytest.approx(sum(held.values()), abs=linears * (4 * (256 + 16) + 200))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_optimizer_state_as_it_is_made(name):
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in (10, 5000, 4096, 70_001)]
    optimizer = build_optimizer(
        [{"params": parameters, "lr": 1e-3, "name": "all"}], name=name, weight_decay=0.0, betas=(0.9, 0.999)
    )
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = {
        value.data_ptr(): value.numel() * value.itemsize
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    expected = optimizer_bytes([parameter.numel() for parameter in parameters], name=name)
    assert expected == pytest.approx(sum(tensors.values()), rel=0.01)


def test_optimizers_by_hand():
    assert optimizer_bytes([100, 8192], name="adamw") == 8 * 8292 + 2 * 4
    # 100 numbers in fp32; 8192 as two bytes each with 32 scales for each moment; two tables.
    assert optimizer_bytes([100, 8192], name="paged_adamw8bit") == 800 + 2 * (8192 + 4 * 32) + 2 * 4 * 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_checkpointing(dtype):
    settings = {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 32}
    model, adapter = tiny_model(dtype=dtype, **settings), AdapterConfig(expert_rank=4, router_rank=2)
    run = RecoveryRun(sequence_length=128, batch_size=4, optimizer="adamw", device="cpu")
    memory = RecoveryMemory(config=model.config, width=32, dtype=dtype, run=run)
    table = memory.table(adapter)
    apply_plan(model, plan=uniform_plan(model, width=32))
    quantize_model(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inject_adapters(model, config=adapter)
    model.train()
    tokens = random_tokens(batch=4, length=128)

    def micro_batch():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits
        next_token_loss(logits, tokens).backward()

    micro_batch()  # gradients are there, and added to
    assert table.activations + table.working == pytest.approx(tensor_peak(micro_batch), rel=0.1)


@pytest.mark.parametrize("name", ["qwen2_moe", "olmoe", "mixtral", "deepseek", "deepseek_v2", "glm4_moe", "granitemoe"])
def test_activations_of_every_kind_of_layer(name):
    run = RecoveryRun(sequence_length=32, gradient_checkpointing=False)
    config = tiny_model(name).config
    memory = RecoveryMemory(config=config, width=WIDTH, dtype=torch.float32, run=run)
    table = memory.table(AdapterConfig(expert_rank=2, router_rank=2))
    # At least queries, keys, values and the output of the attention, and the pairs' three projections.
    assert table.activations > 2 * 32 * 4 * (4 * 64 + 2 * (2 * WIDTH + 64))
    longer = RecoveryMemory(config=config, width=WIDTH, dtype=torch.float32, run=RecoveryRun(sequence_length=64))
    assert longer.table(AdapterConfig(expert_rank=2, router_rank=2)).total > 0


def test_logits_decide_where_the_vocabulary_is_large():
    config = tiny_model(vocab_size=100 * VOCAB_SIZE).config
    run = RecoveryRun(sequence_length=64, device="cpu")
    table = RecoveryMemory(config=config, width=WIDTH, dtype=torch.bfloat16, run=run).table(ADAPTERS[0])
    numbers = 64 * 12_800
    assert table.working == 2 * 2 * numbers + 4 * 4 * numbers


def test_the_claim_of_the_24_gb_config(tmp_path, caplog):
    caplog.set_level("INFO")
    found = ask("24GB", tmp_path, prune_ratio=0.25)
    assert found["expert_rank"] >= 8
    assert found["layers"] == list(range(48))
    memory = RecoveryMemory(config=read_stock(), width=576, dtype=torch.bfloat16)
    assert memory.table(AdapterConfig(expert_rank=8)).total / 1e9 == pytest.approx(19.0, abs=0.1)
    assert memory.table(AdapterConfig(expert_rank=32)).total / 1e9 > 24
    assert "DoRA of rank 16 on the experts and 4 on the router of all 48 MoE layers" in caplog.text


def test_top_layers_where_no_rank_fits(tmp_path, caplog):
    caplog.set_level("INFO")
    found = ask("15GB", tmp_path, prune_ratio=0.25, sequence_length=512)
    assert found["expert_rank"] == 2
    count = len(found["layers"])
    assert found["layers"] == list(range(48 - count, 48))
    assert found["memory"]["total"] <= found["bytes"] == 15 * 10**9
    assert f"the top {count} of 48 MoE layers (from layer {48 - count} on)" in caplog.text


def test_what_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"No recovery run fits 8\.000 GB: expert rank 2 on the topmost MoE layer alone"
    ):
        ask("8GB", tmp_path, prune_ratio=0.25)
    with pytest.raises(ValueError, match="`sequence_length` must be a whole number from 1 to 16,777,216, got 0"):
        RecoveryRun(sequence_length=0)
    with pytest.raises(ValueError, match="`optimizer` must be one of"):
        RecoveryRun(optimizer="sgd")


def read_stock():
    folder = CONFIGS / "qwen3_30b_a3b.json"
    return type(tiny_model().config)(**json.loads(folder.read_text()))


def ask(memory, tmp_path, **settings):
    run = {"sequence_length": 1024, "batch_size": 1, "optimizer": "paged_adamw8bit", "gradient_checkpointing": True}
    answer_from_config(
        config_json=str(CONFIGS / "qwen3_30b_a3b.json"),
        fit_training=memory,
        json=str(tmp_path / "sizes.json"),
        **run | {"router_rank": 4, "attention_rank": 0} | settings,
    )
    return json.loads((tmp_path / "sizes.json").read_text())["training"]


def test_without_a_ratio_the_whole_model_is_recovered(tmp_path):
    answer_from_config(
        config_json="asset:small_moe",
        fit_training="10GB",
        json=str(tmp_path / "sizes.json"),
        sequence_length=256,
        batch_size=1,
        optimizer="adamw",
        gradient_checkpointing=False,
        router_rank=4,
        attention_rank=8,
    )
    found = json.loads((tmp_path / "sizes.json").read_text())
    assert found["ratio"] == 0
    assert found["training"]["expert_rank"] == 32
    assert read_config("asset:small_moe").num_hidden_layers == found["training"]["num_layers"]
