"""Stock checkpoints that are really smaller: what they promise, and what is refused by name."""

import subprocess
import sys

import pytest
import torch
from random_plans import random_plan, uniform_plan
from safetensors.torch import save_file
from tiny_models import FAMILY_NAMES, NUM_EXPERTS, WIDTH, random_tokens, tiny_model

from lightning_moe.export import writers
from lightning_moe.export.deploy import export_model
from lightning_moe.export.padded import export_padded
from lightning_moe.files import read_shapes
from lightning_moe.models.discovery import model_shape
from lightning_moe.models.families import family_of
from lightning_moe.models.loading import load_model
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import apply_plan

# Loads every folder in a process that never saw this package, generates, and compares logits.
_PROGRAM = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in sorted(Path(sys.argv[1]).glob("*/*")):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], (folder, report)
    expected = load_file(folder.parent.parent / f"{folder.parent.name}.expected")
    with torch.no_grad():
        logits = model(input_ids=expected["ids"], use_cache=False).logits
    assert (logits - expected["logits"]).abs().max() < 1e-4, folder
    assert model.generate(expected["ids"], max_new_tokens=2, do_sample=False).shape[1] == expected["ids"].shape[1] + 2
    print(folder)
assert not [name for name in sys.modules if name.split(".")[0] in ("lightning_moe", "lightning")]
"""


def dropped_plan(model, *, dropped):
    """Plan that drops the same experts of every layer and keeps all channels of the others."""
    shape = model_shape(model)
    keep = []
    for layer in shape.layers:
        keep_EC = torch.ones(layer.num_experts, layer.widths[0], dtype=torch.bool)
        keep_EC[list(dropped)] = False
        keep.append(keep_EC.flatten())
    return PrunePlan(
        shape=shape, method="dropped", prune_ratio=0.25, align=1, keep=tuple(keep), provenance={"corpora": "a"}
    )


def cut(name, plan, **settings):
    model = tiny_model(name, **settings)
    apply_plan(model, plan=plan(model))
    return model


def uniform(model):
    return uniform_plan(model, width=16)


def without_two(model):
    return dropped_plan(model, dropped=(1, 6))


@torch.no_grad()
def logits_of(model):
    return model(input_ids=random_tokens(), use_cache=False).logits


def test_they_load_in_a_process_without_this_package(tmp_path):
    cases = [(name, "uniform", uniform) for name in FAMILY_NAMES if name != "deepseek"]
    cases += [(name, "expert_dropped", without_two) for name in FAMILY_NAMES if name != "deepseek"]
    for name, format, plan in cases:
        model = cut(name, plan)
        folder = tmp_path / f"{name}_{format}"
        save_file({"ids": random_tokens(), "logits": logits_of(model)}, f"{folder}.expected")
        (result,) = export_model(model, folder=folder, formats=[format])
        is_ernie = name == "ernie4_5_moe"  # llama.cpp derives the width of shared experts, not as tiny models have it
        assert result.engines == (("vLLM",) if is_ernie else ("vLLM", "llama.cpp"))
        assert result.rerouted == 0
        assert len(result.notes) == is_ernie
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.split()) == len(cases) == 20


@pytest.mark.parametrize(("format", "plan"), [("uniform", uniform), ("expert_dropped", without_two)])
def test_no_channel_is_added_and_every_byte_saved_is_saved(format, plan, tmp_path):
    model = cut("qwen3_moe", plan)
    export_model(tiny_model(), folder=tmp_path, formats=["stock"])
    (result,) = export_model(model, folder=tmp_path, formats=[format])
    shapes = [
        {name: shape for file in (tmp_path / folder).glob("*.safetensors") for name, shape in shapes_of(file).items()}
        for folder in ("stock", format)
    ]
    before, after = [sum(torch.Size(shape).numel() for shape in own.values()) for own in shapes]
    # 2 layers, 3 projections, 64 hidden: 8 experts lose 16 channels; or 2 experts lose 32 and a router row of 64.
    assert before - after == {"uniform": 2 * 8 * 3 * 64 * 16, "expert_dropped": 2 * 2 * (3 * 64 * 32 + 64)}[format]
    config = load_model(result.base).config
    assert (config.num_experts, config.moe_intermediate_size) == {
        "uniform": (NUM_EXPERTS, 16),
        "expert_dropped": (6, WIDTH),
    }[format]
    for name in (name for name in shapes[1] if "experts.0." in name):
        channels = load_model(result.base).state_dict()  # fused; each channel has weights
        assert all(value.abs().sum(-1).gt(0).all() for key, value in channels.items() if "experts" in key), name


def shapes_of(file):
    return read_shapes(file, what="weights")


@pytest.mark.parametrize("name", ["deepseek_v2_grouped", "deepseek_v3_grouped", "glm4_moe_grouped"])
def test_experts_behind_groups_go_where_each_group_lost_as_many(name, tmp_path):
    """4 groups of 4 experts, the best 2 groups are chosen: one expert of each group goes."""
    settings = {"n_routed_experts": 16}
    model = cut(name, lambda model: dropped_plan(model, dropped=(0, 5, 10, 15)), **settings)
    (result,) = export_model(model, folder=tmp_path, formats=["expert_dropped"])
    loaded = load_model(result.base)
    assert family_of(loaded.config).expert_count == "n_routed_experts"
    assert loaded.config.n_routed_experts == 12
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-4, atol=1e-5)
    uneven = cut(name, lambda model: dropped_plan(model, dropped=(0, 1, 10, 15)), **settings)
    with pytest.raises(ValueError, match="in every group of a grouped router"):
        export_model(uneven, folder=tmp_path / "uneven", formats=["expert_dropped"])


def test_shared_experts_that_are_padded_all_the_same_are_said(tmp_path):
    """Shared experts of 32 channels: a multiple of 24 is 48, of 16 is 32."""
    (result,) = export_model(
        cut("deepseek_v2", lambda model: uniform_plan(model, width=24)), folder=tmp_path, formats=["uniform"]
    )
    assert "16 zero channels beside its 32" in result.notes[0]
    assert "16 zero channels" in (tmp_path / "uniform" / "README.md").read_text()
    assert load_model(result.base).config.n_shared_experts == 2


def test_deepseek_needs_its_own_code_and_says_so(tmp_path):
    (result,) = export_model(cut("deepseek", uniform), folder=tmp_path, formats=["uniform"])
    assert "transformers has no `deepseek` model of its own" in result.notes[0]
    assert "import lightning_moe\n" in (tmp_path / "uniform" / "README.md").read_text()


@pytest.mark.parametrize(
    ("format", "plan", "match"),
    [
        ("uniform", random_plan, r"has \d+ widths from \d+ to \d+ channels: .*x\).* plan --method uniform"),
        ("uniform", lambda model: uniform_plan(model, width=12), "multiples of 8, got 12.* --method_args '{align: 8}'"),
        ("uniform", lambda model: uniform_plan(model, width=WIDTH), "has all 8 experts of 32 channels. Use `stock`"),
        ("expert_dropped", uniform, "keeps all 32 channels .* and here they have 16 to 16. Use `uniform`"),
        ("expert_dropped", lambda model: uniform_plan(model, width=WIDTH), "all 8 of each layer are here"),
        (
            "expert_dropped",
            lambda model: random_plan(model, evicted=((1,), (2, 3))),
            r"the layers keep 6 to 7 of 8: 7 \(1x\), 6 \(1x\). Plan one width .*drop equally many in each layer",
        ),
        ("uniform", lambda model: random_plan(model, evicted=((1,), (2, 3))), "keep 6 to 7 of 8"),
    ],
)
def test_what_such_a_checkpoint_does_not_hold_is_refused(format, plan, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        export_model(cut("qwen3_moe", plan), folder=tmp_path, formats=[format])
    assert not (tmp_path / format).exists()


def test_one_width_and_fewer_experts_are_uniform_too(tmp_path):
    def both(model):
        plan = uniform_plan(model, width=16)
        keep = tuple(keep_C.view(8, -1).clone() for keep_C in plan.keep)
        for keep_EC in keep:
            keep_EC[3] = False
        return PrunePlan(
            shape=plan.shape,
            method="both",
            prune_ratio=0.5,
            align=1,
            keep=tuple(keep_EC.flatten() for keep_EC in keep),
            provenance={},
        )

    (result,) = export_model(cut("mixtral", both), folder=tmp_path, formats=["uniform"])
    config = load_model(result.base).config
    assert (config.num_local_experts, config.intermediate_size) == (7, 16)


def test_an_export_that_is_not_smaller_is_refused(tmp_path, monkeypatch):
    def larger(model, folder, *, dtype):
        export_padded(tiny_model(moe_intermediate_size=64), folder)

    monkeypatch.setattr(writers, "export_padded", larger)
    with pytest.raises(ValueError, match=r"is not smaller than the dense model: [\d,]+ bytes of tensors against"):
        export_model(cut("qwen3_moe", uniform), folder=tmp_path, formats=["uniform"])
