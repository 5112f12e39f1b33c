"""The script that makes a Mixture of Experts out of a dense model, on a tiny dense model."""

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from scripts import make_smollm2_moe as script

CHANNELS = 64


@pytest.fixture
def dense():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=CHANNELS,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_experts_that_get_every_channel_give_the_dense_model(dense, monkeypatch):
    monkeypatch.setattr(script, "WIDTH", CHANNELS)
    monkeypatch.setattr(script, "NUM_EXPERTS", 4)
    monkeypatch.setattr(script, "RIDGE", 0.0)
    monkeypatch.setattr(script, "train_block", lambda *args, epochs: [0.0, 0.0])
    ids_NS = torch.randint(61, (96, 32))
    moe = script.empty_moe(dense)
    states = script.LayerStates(dense, ids_NS)
    for old, new in zip(dense.model.layers, moe.model.layers, strict=True):
        states.distil(old, new, epochs=0)
    torch.testing.assert_close(moe(ids_NS).logits, dense(ids_NS).logits, atol=1e-4, rtol=1e-4)


def test_half_of_the_channels_are_those_the_cluster_uses_most_and_training_brings_them_closer(dense, monkeypatch):
    monkeypatch.setattr(script, "WIDTH", CHANNELS // 2)
    monkeypatch.setattr(script, "NUM_EXPERTS", 4)
    moe = script.empty_moe(dense)
    block, mlp = moe.model.layers[0].mlp, dense.model.layers[0].mlp
    x_TH, q_T = torch.randn(8192, 32), torch.ones(8192)
    target_TH = mlp(x_TH)
    script.start_experts(block, mlp, x_TH, target_TH, q_T)
    own_T = (block.gate(x_TH)[2] == 1).any(1)
    used_C = (F.silu(mlp.gate_proj(x_TH[own_T])) * mlp.up_proj(x_TH[own_T])).square().sum(0)
    used_C *= mlp.down_proj.weight.square().sum(0)
    chosen = used_C.topk(CHANNELS // 2).indices.sort().values
    own = slice(CHANNELS // 2, CHANNELS)
    torch.testing.assert_close(block.experts.gate_proj.weight[own], mlp.gate_proj.weight[chosen])
    before, after = script.train_block(block, x_TH, target_TH, q_T, epochs=4)
    assert after < 0.9 * before


def test_clusters_are_directions_that_the_tokens_have():
    torch.manual_seed(1)
    true_EH = F.normalize(torch.randn(3, 16), dim=1)
    unit_TH = F.normalize(true_EH.repeat(50, 1) + 0.01 * torch.randn(150, 16), dim=1)
    found_EH = script.cluster(unit_TH, num_clusters=3)
    torch.testing.assert_close(found_EH.norm(dim=1), torch.ones(3))
    assert float((unit_TH @ found_EH.T).max(1).values.mean()) > 0.9
