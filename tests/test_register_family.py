"""A family of one's own: what is declared is checked on a model."""

from dataclasses import replace

import pytest
from family_cases import CASES
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_moe.models.declaration import check_family
from lightning_moe.models.families import FAMILIES, Family, register_family


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_is_as_declared(case):
    check_family(case.model())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3_moe", {"router": "gatte"}, r"the block has no 'gatte', it has \['.*'\]"),
        ("qwen3_moe", {"shared_experts": ("shared",)}, "the block has no 'shared'"),
        (
            "qwen3_moe",
            {"expert_count": "num_local"},
            "the config has no field 'num_local', which the declaration names as `expert_count`",
        ),
        ("qwen3_moe", {"expert_width": "intermediate_size"}, r"must be \[8, 96, 64\] \(`num_experts` 8, `inter"),
        ("qwen3_moe", {"score": "sigmoid"}, "not in proportion to the `sigmoid` of its logits"),
        ("deepseek_v3", {"score": "softmax"}, "not in proportion to the `softmax` of its logits"),
        ("deepseek_v3", {"router_rows": {"weight": 0}}, r"'gate.e_score_correction_bias' \[8\] has an entry per exp"),
        ("qwen3_moe", {"router_rows": {"weight": 1}}, r"says 8 entries in dimension 1 of 'weight', the router has"),
        ("qwen3_moe", {"selection_bias": "bias"}, "`selection_bias` 'bias' is not in `router_rows`"),
    ],
)
def test_a_wrong_declaration_is_named(monkeypatch, name, change, message):
    model = tiny_model(name)
    monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], **change))
    with pytest.raises(ValueError, match=f"Family '{name}' does not fit 'model.layers.*{message}"):
        check_family(model)


def test_experts_of_another_form_are_found():
    model = tiny_model()
    model.model.layers[1].mlp.experts.act_fn = nn.Identity()
    check_family(model)  # any activation will do
    experts = model.model.layers[1].mlp.experts
    experts.forward = lambda hidden_TH, index_TK, weight_TK: (
        2 * type(experts).forward(experts, hidden_TH, index_TK, weight_TK)
    )
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp': its experts do not compute down\(act\(gate\) \* up\)"):
        check_family(model)


def test_experts_with_biases_and_routers_of_another_form_are_found():
    model = tiny_model()
    model.model.layers[0].mlp.experts.register_parameter("bias", nn.Parameter(model.lm_head.weight[0]))
    with pytest.raises(ValueError, match=r"nothing else, they have \['bias', 'down_proj', 'gate_up_proj'\]"):
        check_family(model)
    model = tiny_model()
    del model.model.layers[0].mlp.gate.top_k
    with pytest.raises(ValueError, match=r"must have `weight` and `top_k`, Qwen3MoeTopKRouter has \['weight'\]"):
        check_family(model)
    model = tiny_model()
    gate = model.model.layers[0].mlp.gate
    gate.forward = lambda hidden_TH: hidden_TH @ gate.weight.T
    with pytest.raises(ValueError, match=r"the router must return \(logits \[T, E\].*, got Tensor"):
        check_family(model)


# Two families of transformers that are not in the table because they store something elsewhere.
ODD = {
    "hunyuan_v1_moe": (
        Family(
            model_type="hunyuan_v1_moe",
            block_class="hunyuan_v1_moe.modeling_hunyuan_v1_moe.HunYuanMoEV1Moe",
            shared_experts=("shared_mlp",),
            expert_width="intermediate_size",
        ),
        {"intermediate_size": 32, "num_experts": 8, "moe_topk": 2, "head_dim": 16},
        r"the router must have `weight` and `top_k`, HunYuanMoEV1Gate has \['wg.weight'\]",
    ),
    "minimax_m2": (
        Family(
            model_type="minimax_m2",
            block_class="minimax_m2.modeling_minimax_m2.MiniMaxM2SparseMoeBlock",
            score="sigmoid",
            expert_width="intermediate_size",
            expert_count="num_local_experts",
        ),
        {"intermediate_size": 32, "num_local_experts": 8, "head_dim": 16},
        r"'e_score_correction_bias' \[8\] has an entry per expert too, outside the router, which takes code",
    ),
}
COMMON = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}


@pytest.mark.parametrize("name", ODD)
def test_families_that_need_more_than_a_declaration_are_told_what(monkeypatch, name):
    family, fields, message = ODD[name]
    config = CONFIG_MAPPING[name](**COMMON, num_key_value_heads=2, num_experts_per_tok=2, **fields)
    monkeypatch.setitem(FAMILIES, name, family)
    with pytest.raises(ValueError, match=message):
        check_family(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("model_type", "block_class", "message"),
    [
        ("qwen3_moe", "x.Y", "'qwen3_moe' is declared already"),
        ("gpt_oss", "x.Y", "'gpt_oss' is refused already"),
        ("mine", "nothing.modeling.Block", r"`block_class` must be .* got 'nothing.modeling.Block': No module named"),
        ("mine", "mixtral.modeling_mixtral.Block", r"got 'mixtral.modeling_mixtral.Block': module .* has no attribute"),
        ("mine", "Block", "got 'Block': not enough values"),
    ],
)
def test_a_wrong_registration_is_refused(model_type, block_class, message):
    with pytest.raises(ValueError, match=message):
        register_family(Family(model_type=model_type, block_class=block_class))
    assert "mine" not in FAMILIES
