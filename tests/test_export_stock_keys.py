"""What engines look for in a stock checkpoint: the hand-written layouts against what transformers writes."""

import json
import re

import pytest
import torch
from random_plans import uniform_plan
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_NAMES, tiny_model
from transformers import AutoConfig

from lightning_moe.export.deploy import export_model
from lightning_moe.export.engine_limits import ENGINES
from lightning_moe.export.padded import export_padded
from lightning_moe.export.stock_keys import check_stock_keys, expected_shapes, set_engine_fields
from lightning_moe.export.stock_layouts import LAYOUTS
from lightning_moe.models.families import FAMILIES
from lightning_moe.surgery.cut import apply_plan

# Fields of configs that switch tensors on.
_OPTIONS = {
    "deepseek_v3": {"q_lora_rank": 24},
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen3_moe": {"mlp_only_layers": [0], "tie_word_embeddings": True},
    "ernie4_5_moe": {"use_bias": False, "moe_layer_interval": 1, "intermediate_size": 64},
}


def exported(folder, name="qwen3_moe", **settings):
    """A padded export of a cut model and its config as an engine reads it."""
    model = tiny_model(name, **settings)
    apply_plan(model, plan=uniform_plan(model, width=16))
    export_padded(model, folder)
    return AutoConfig.from_pretrained(folder)


def change(folder, edit):
    """Edits the tensors of the first shard."""
    file = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_every_family_has_a_layout():
    assert set(LAYOUTS) == set(FAMILIES)


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_stock_exports_are_what_engines_look_for(name, options, tmp_path):
    if options and name not in _OPTIONS:
        pytest.skip("no options")
    config = exported(tmp_path / "padded", name, **(_OPTIONS[name] if options else {}))
    engines, limits = check_stock_keys(tmp_path / "padded", config=config)
    expected = ("vLLM",) if name == "ernie4_5_moe" and not options else ENGINES  # 48 / 2 channels, and there are 32
    assert (engines, len(limits)) == (expected, len(ENGINES) - len(expected))


def test_a_few_by_hand():
    """Tiny models of each kind of MoE block: hidden 64, 8 experts of 32 channels, 4 heads of 16, 2 of them keys."""
    by_hand = {
        "qwen2_moe": {
            "model.layers.1.mlp.experts.7.down_proj.weight": (64, 32),
            "model.layers.0.mlp.shared_expert_gate.weight": (1, 64),
            "model.layers.0.mlp.shared_expert.up_proj.weight": (24, 64),
        },
        "mixtral": {
            "model.layers.0.block_sparse_moe.experts.3.w1.weight": (32, 64),
            "model.layers.0.block_sparse_moe.experts.3.w2.weight": (64, 32),
            "model.layers.0.block_sparse_moe.gate.weight": (8, 64),
            "model.layers.0.self_attn.k_proj.weight": (32, 64),
        },
        "granitemoe": {
            "model.layers.1.block_sparse_moe.input_linear.weight": (8, 64, 64),
            "model.layers.1.block_sparse_moe.output_linear.weight": (8, 64, 32),
            "model.layers.1.block_sparse_moe.router.layer.weight": (8, 64),
        },
        "deepseek_v3": {
            "model.layers.0.mlp.gate_proj.weight": (48, 64),
            "model.layers.2.mlp.gate.e_score_correction_bias": (8,),
            "model.layers.2.self_attn.kv_a_proj_with_mqa.weight": (16 + 8, 64),
            "model.layers.2.self_attn.kv_b_proj.weight": (4 * (8 + 16), 16),
        },
        "ernie4_5_moe": {"model.layers.1.mlp.moe_statics.e_score_correction_bias": (1, 8)},
        "qwen3_next": {
            "model.layers.1.self_attn.q_proj.weight": (128, 64),
            "model.layers.0.linear_attn.in_proj_qkvz.weight": (2 * 2 * 16 + 2 * 4 * 16, 64),
        },
    }
    for name, shapes in by_hand.items():
        required, _ = expected_shapes(tiny_model(name).config)
        assert shapes.items() <= required.items(), name


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            lambda tensors: tensors.pop("model.layers.0.mlp.experts.5.up_proj.weight"),
            r"Qwen3MoeForCausalLM: 'model\.layers\.0\.mlp\.experts\.5\.up_proj\.weight' is missing, \(16, 64\) is exp",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.gate.bias": torch.zeros(8)}),
            r"'model\.layers\.0\.mlp\.gate\.bias' has shape \(8,\), none of that name is known",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.gate.weight": torch.zeros(7, 64)}),
            r"gate\.weight' has shape \(7, 64\), \(8, 64\) is expected\. It is left there for inspection",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(edit, match, tmp_path):
    config = exported(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(ValueError, match=match):
        check_stock_keys(tmp_path, config=config)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("qwen3_moe", "architectures", ["Qwen3ForCausalLM"]),
        ("deepseek_v3", "topk_method", None),
        ("deepseek_v3", "num_nextn_predict_layers", 1),
        ("deepseek_v2", "scoring_func", "sigmoid"),
        ("qwen3_moe", "rope_theta", 5e5),
        ("qwen3_moe", "num_experts", 128),
        ("qwen2_moe", "num_experts_per_tok", 4),
        ("mixtral", "intermediate_size", 32),
        ("glm4_moe", "partial_rotary_factor", None),
        ("olmoe", "torch_dtype", None),
    ],
)
def test_config_fields_that_engines_read_are_there(name, field, value, tmp_path):
    config = exported(tmp_path, name)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=rf"`{field}` in config\.json is {re.escape(repr(value))}, expected"):
        check_stock_keys(tmp_path, config=config)


def test_fields_of_the_source_are_kept():
    config = tiny_model("deepseek_v3").config
    config.scoring_func = "something else"
    set_engine_fields(config)
    assert (config.topk_method, config.num_nextn_predict_layers) == ("noaux_tc", 0)
    assert config.scoring_func == "something else"


def test_stock_exports_are_checked(tmp_path):
    (result,) = export_model(tiny_model("glm4_moe"), folder=tmp_path, formats=["stock"])
    assert result.engines == ENGINES
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_the_converters_own_table_knows_every_name():
    """Experts that the converter merges go by the name of the merged tensor; Granite's it splits by itself."""
    gguf = pytest.importorskip("gguf")
    architectures = {
        "mixtral": "LLAMA",
        "deepseek_v2": "DEEPSEEK2",
        "deepseek_v3": "DEEPSEEK2",
        "granitemoe": "GRANITE_MOE",
    }
    for name in FAMILY_NAMES:
        config = tiny_model(name).config
        architecture = architectures.get(name) or name.upper().replace("QWEN2_MOE", "QWEN2MOE")
        architecture = architecture.replace("QWEN3_MOE", "QWEN3MOE").replace("QWEN3_NEXT", "QWEN3NEXT")
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.num_hidden_layers)
        required, _ = expected_shapes(config)
        for tensor in required:
            if tensor.endswith(("input_linear.weight", "in_proj_ba.weight", "in_proj_qkvz.weight", "A_log", "dt_bias")):
                continue  # split or renamed by code of the family's own
            merged = re.sub(r"experts\.\d+\.w(\d)", r"experts.w\1", re.sub(r"(mlp\.experts)\.\d+\.", r"\1.", tensor))
            merged = (
                merged.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
                if (name == "mixtral" and ".experts." in merged)
                else merged
            )
            merged = merged.replace("e_score_correction_bias", "e_score_correction.bias")
            assert table.get_name(merged, try_suffixes=(".weight", ".bias")), (name, tensor)
