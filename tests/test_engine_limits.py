"""Checkpoints that transformers loads and an engine does not run: a sentence beside the result, by engine."""

import pytest
from random_plans import uniform_plan
from tiny_models import tiny_model

from lightning_moe.export.deploy import export_model
from lightning_moe.surgery.cut import apply_plan


@pytest.mark.parametrize(
    ("name", "settings", "engines", "notes"),
    [
        (
            "qwen3_moe",
            {"attention_bias": True},
            (),
            [
                "not for vLLM: it does not read the biases of o_proj",
                "not for llama.cpp: it does not read the biases of k_proj, o_proj, q_proj, v_proj",
            ],
        ),
        ("glm4_moe", {"attention_bias": True}, ("vLLM", "llama.cpp"), []),
        ("qwen2_moe", {"qkv_bias": False}, ("vLLM",), ["not for llama.cpp: it wants the biases of q_proj, k_proj"]),
        ("deepseek_v2", {"norm_topk_prob": True}, ("vLLM",), ["not for llama.cpp: it does not normalise the weights"]),
        ("ernie4_5_moe", {"intermediate_size": 48}, ("vLLM",), ["not for llama.cpp: it derives 24 channels of"]),
        ("ernie4_5_moe", {"intermediate_size": 64}, ("vLLM", "llama.cpp"), []),
    ],
)
def test_what_an_engine_does_not_run_is_said(name, settings, engines, notes, tmp_path):
    model = tiny_model(name, **settings)
    apply_plan(model, plan=uniform_plan(model, width=16))
    (result,) = export_model(model, folder=tmp_path, formats=["uniform"])
    assert result.engines == engines
    assert len(result.notes) == len(notes)
    assert all(told.startswith(note) for told, note in zip(result.notes, notes, strict=True))
    card = (tmp_path / "uniform" / "README.md").read_text()
    assert all(f"Note: {note}" in card for note in notes)
