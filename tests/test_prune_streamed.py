"""Pruning layer by layer writes what the whole model in memory gives, bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from alike_channels import alike_model
from family_cases import CASES, EVICTED, Case
from random_plans import random_plan
from safetensors import safe_open
from streamed_pruning import SHARD, assert_same_folder, prune_streamed, prune_whole, random_novices
from tiny_models import random_tokens, tiny_model
from transformers import AutoModelForCausalLM

from lightning_moe.models.loading import load_model

KINDS = {
    "nf4": {"quantize": True},
    "16_bit": {"quantize": False},
    "nf4_repaired": {"quantize": True, "repair": True},
    "16_bit_repaired": {"quantize": False, "repair": True},
    "after_nf4": {"quantize": True, "repair": "after_nf4"},
}


# Every family in two ways, and some of them in all.
SOME = ("qwen3_moe", "deepseek_v2_grouped", "deepseek_v3_grouped")
RUNS = [(case, kind) for case in CASES for kind in KINDS if kind in ("nf4", "16_bit_repaired") or case.name in SOME]


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    return KINDS[request.param]


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize(("case", "name"), RUNS, ids=[f"{case.name}-{kind}" for case, kind in RUNS])
def test_the_folder_is_that_of_the_whole_model(case, name, tmp_path) -> None:
    kind = KINDS[name]
    options = case.overrides | {"tie_word_embeddings": case.name == "qwen3_moe"}
    alike_model(case.name, noise=0.05, **options).save_pretrained(tmp_path / "stock", max_shard_size=SHARD)
    source = str(tmp_path / "stock")
    plan = random_plan(load_model(source), evicted=EVICTED)
    prune_streamed(source, tmp_path / "out", plan=plan, **kind)
    repaired = prune_whole(source, tmp_path / "whole", plan=plan, **kind)
    assert (repaired > 3) == ("repair" in kind)
    assert_same_folder(tmp_path / "out", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stock", "whole"]


@pytest.mark.parametrize("name", SOME[:2])
def test_with_novices(name, tmp_path, kind) -> None:
    case_of(name).model(dtype=torch.bfloat16).save_pretrained(tmp_path / "stock")
    source = str(tmp_path / "stock")
    plan = random_plan(load_model(source), evicted=EVICTED)
    options = {"plan": plan, "novices": random_novices(plan)} | kind
    prune_streamed(source, tmp_path / "out", **options)
    prune_whole(source, tmp_path / "whole", **options)
    assert_same_folder(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("packed", [False, True], ids=["ragged", "packed"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3_grouped"])
def test_a_pruned_folder_is_pruned_again(name, packed, kind, tmp_path) -> None:
    alike_model(name, noise=0.05, **case_of(name).overrides).save_pretrained(tmp_path / "stock")
    first = random_plan(load_model(str(tmp_path / "stock")), evicted=((1,), ()))
    novices = random_novices(first)
    prune_streamed(str(tmp_path / "stock"), tmp_path / "once", plan=first, quantize=packed, novices=novices)
    source = str(tmp_path / "once")
    plan = random_plan(load_model(source), evicted=((), (3,)), seed=1)
    prune_streamed(source, tmp_path / "out", plan=plan, **kind)
    prune_whole(source, tmp_path / "whole", plan=plan, **kind)
    assert_same_folder(tmp_path / "out", tmp_path / "whole")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [one["digest"] for one in manifest["plans"]] == [first.digest, plan.digest]


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v3_grouped"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_packing_alone(name, dtype, tmp_path) -> None:
    case_of(name).model(dtype=torch.bfloat16).save_pretrained(tmp_path / "stock", max_shard_size=SHARD)
    options = {"plan": None, "quantize": True, "dtype": dtype}
    prune_streamed(str(tmp_path / "stock"), tmp_path / "out", **options)
    prune_whole(str(tmp_path / "stock"), tmp_path / "whole", **options)
    assert_same_folder(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("quantize", [True, False])
def test_a_layer_that_loses_nothing_is_run_like_the_others(quantize, tmp_path) -> None:
    alike_model("qwen3_moe", noise=0.05, dtype=torch.bfloat16).save_pretrained(tmp_path / "stock")
    plan = random_plan(load_model(str(tmp_path / "stock")))
    plan = replace(plan, keep=(torch.ones_like(plan.keep[0]), *plan.keep[1:]))
    options = {"plan": plan, "quantize": quantize, "repair": True}
    prune_streamed(str(tmp_path / "stock"), tmp_path / "out", **options)
    prune_whole(str(tmp_path / "stock"), tmp_path / "whole", **options)
    assert_same_folder(tmp_path / "out", tmp_path / "whole")


def test_groups_of_experts_and_the_hidden_states_elsewhere_change_nothing(tmp_path) -> None:
    alike_model("deepseek_v2", noise=0.05).save_pretrained(tmp_path / "stock")
    source = str(tmp_path / "stock")
    plan = random_plan(load_model(source), evicted=EVICTED)
    options = {"plan": plan, "quantize": True, "repair": True}
    three_experts = 3.5 * 2 * 4 * 32**2 / 2**30
    elsewhere = tmp_path / "elsewhere"
    prune_streamed(source, tmp_path / "out", memory_gb=three_experts, workspace=elsewhere, **options)
    prune_whole(source, tmp_path / "whole", **options)
    assert_same_folder(tmp_path / "out", tmp_path / "whole")
    assert not elsewhere.exists()


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_tied_embeddings_are_stored_once(stored, tmp_path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    if stored != "both":
        del tensors[({"lm_head.weight", "model.embed_tokens.weight"} - {stored}).pop()]
    model.save_pretrained(tmp_path / "stock", state_dict=tensors)
    source, out = str(tmp_path / "stock"), tmp_path / "out"
    prune_streamed(source, out, plan=None, quantize=True)
    prune_whole(source, tmp_path / "whole", plan=None, quantize=True)
    assert_same_folder(out, tmp_path / "whole")


def test_stock_from_pretrained_loads_the_shards(tmp_path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "stock")
    plan = random_plan(load_model(str(tmp_path / "stock")), evicted=EVICTED)
    prune_streamed(str(tmp_path / "stock"), tmp_path / "out", plan=plan, quantize=True)
    prune_whole(str(tmp_path / "stock"), tmp_path / "whole", plan=plan, quantize=True)
    found, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "whole"))
    with torch.no_grad():
        assert torch.equal(found(random_tokens()).logits, expected(random_tokens()).logits)


def test_the_layout_of_the_folder(tmp_path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "stock")
    prune_streamed(str(tmp_path / "stock"), tmp_path / "out", plan=None, quantize=True)
    names = [f"model-0000{index}-of-00004.safetensors" for index in (1, 2, 3, 4)]
    rest = ["README.md", "config.json", "generation_config.json", "manifest.json", "model.safetensors.index.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(rest + names)
    text = (tmp_path / "out" / "model.safetensors.index.json").read_text()
    index, keys, total = json.loads(text), {}, 0
    for name in names:
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            keys |= dict.fromkeys(file.keys(), name)
            total += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert index == {"metadata": {"total_size": total}, "weight_map": keys}
    assert text == json.dumps(index, indent=2) + "\n"
    assert list(index["weight_map"]) == sorted(keys)
    for key, name in keys.items():
        layer = key.split(".")[2] if key.startswith("model.layers.") else "3"
        assert names[int(layer)] == name


def test_the_folder_has_a_card_and_keeps_one_that_was_edited(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path / "stock")
    plan = random_plan(load_model(str(tmp_path / "stock")))
    card = tmp_path / "out" / "README.md"
    prune_streamed(str(tmp_path / "stock"), tmp_path / "out", plan=plan, quantize=True)
    assert "What was cut" in card.read_text()
    card.write_text("Mine.")
    prune_streamed(str(tmp_path / "stock"), tmp_path / "out", plan=plan, quantize=False)
    assert card.read_text() == "Mine."
