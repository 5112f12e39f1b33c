"""Sizes counted from a config alone against the files of really saved models."""

from pathlib import Path

import pytest
import torch
from family_cases import CASES, EVICTED
from random_plans import random_plan, uniform_plan
from sharded_folders import headers_of, shard
from statistics_factory import make_shape
from tiny_models import tiny_model
from transformers import AutoConfig

from lightning_moe.evaluation.stages import model_bytes
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.discovery import model_shape
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.footprint import measure_footprint
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.size import read_sizes, sizes_of
from lightning_moe.surgery.cut import apply_plan

PACKED_TEXT = ".quant_state.bitsandbytes__nf4"


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def widths_of(plan):
    return [plan.widths(index) for index in range(len(plan.shape.layers))]


def count(sizes, widths):
    names = {torch.bool: "BOOL", torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    return {tensor.name: (names[tensor.dtype], tensor.shape) for tensor in sizes.tensors(widths)}


def without_text(tensors):
    return {name: value for name, value in tensors.items() if not name.endswith(PACKED_TEXT)}


def assert_bytes(foretold, *, folder, stored):
    """To the byte; above by the digits of one number in the text of each packed layer, and by the headers' eights."""
    written, packed = model_bytes(folder), sum(name.endswith(PACKED_TEXT) for name in stored)
    assert written <= foretold <= written + (8 * packed + 8 * len(list(folder.glob("*.safetensors"))) if packed else 0)


def save_cut(model, folder, *, plan, bits, **settings):
    apply_plan(model, plan=plan)
    if bits == 4:
        quantize_model(model)
    save_ragged(model, folder, **settings)
    shard(folder)


@pytest.mark.parametrize("bits", [16, 4])
def test_every_tensor_of_every_family_is_foretold(case, bits, tmp_path):
    case.model(dtype=torch.bfloat16).save_pretrained(tmp_path / "stock")
    sizes = read_sizes(str(tmp_path / "stock"), bits=bits)
    model = load_model(str(tmp_path / "stock"))
    plan = random_plan(model, evicted=EVICTED)
    save_cut(model, tmp_path / "cut", plan=plan, bits=bits)
    foretold, stored = count(sizes, widths_of(plan)), headers_of(tmp_path / "cut")
    assert set(foretold) == set(stored)
    assert without_text(foretold) == without_text(stored)
    assert sizes.stored_params(widths_of(plan)) == measure_footprint(model).stored_params
    assert_bytes(sizes.num_bytes(widths_of(plan)), folder=tmp_path / "cut", stored=stored)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(("width", "evicted"), [(128, ()), (96, ((0, 3), (5,))), (64, ((1,), (2, 6, 7)))])
def test_bytes_are_within_a_thousandth(tied, bits, width, evicted, tmp_path):
    model = tiny_model(
        dtype=torch.bfloat16, hidden_size=192, moe_intermediate_size=128, vocab_size=1000, tie_word_embeddings=tied
    )
    before = model.config.to_dict()
    sizes = sizes_of(model.config, bits=bits)
    assert model.config.to_dict() == before
    plan = uniform_plan(model, width=width, evicted=evicted)
    save_cut(model, tmp_path / "cut", plan=plan, bits=bits)
    assert sizes.num_bytes(widths_of(plan)) == pytest.approx(model_bytes(tmp_path / "cut"), rel=1e-3)
    assert (sizes.dense == tuple(widths_of(plan))) == (width == 128)


def test_the_stock_folder_is_a_hundredth_larger_at_most(tmp_path):
    model = tiny_model(dtype=torch.bfloat16, hidden_size=192, moe_intermediate_size=256)
    model.save_pretrained(tmp_path / "stock")
    sizes = read_sizes(str(tmp_path / "stock"), bits=16)
    assert sizes.num_bytes(sizes.dense) == pytest.approx(model_bytes(tmp_path / "stock"), rel=0.01)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe", "granitemoe"])
def test_matrices_in_another_type_than_norms(name, bits, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "stock")
    sizes = read_sizes(str(tmp_path / "stock"), bits=bits, dtype="float32", stored_dtype=torch.bfloat16)
    model = load_model(str(tmp_path / "stock"), dtype="float32")
    plan = random_plan(model, evicted=EVICTED)
    save_cut(model, tmp_path / "cut", plan=plan, bits=bits, dtype=torch.bfloat16)
    foretold, stored = count(sizes, widths_of(plan)), headers_of(tmp_path / "cut")
    assert without_text(foretold) == without_text(stored)
    assert_bytes(sizes.num_bytes(widths_of(plan)), folder=tmp_path / "cut", stored=stored)


def test_a_cut_folder_is_counted_like_the_model_it_came_from(tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    dense = sizes_of(model.config, bits=4)
    plan = random_plan(model, evicted=EVICTED)
    save_cut(model, tmp_path / "cut", plan=plan, bits=4)
    again = read_sizes(str(tmp_path / "cut"), bits=4)
    present = [layer.widths for layer in model_shape(load_model(str(tmp_path / "cut"))).layers]
    assert again.num_bytes(present) == pytest.approx(dense.num_bytes(widths_of(plan)), abs=20)
    again.check_fits(model_shape(model))
    with pytest.raises(ValueError, match="in 4 bit already, and stays so when it is cut: count it with `bits` 4"):
        read_sizes(str(tmp_path / "cut"), bits=16)


@pytest.mark.parametrize("bits", [16, 4])
def test_the_shipped_model(bits, tmp_path):
    sizes, model = read_sizes("asset:small_moe", bits=bits), load_model("asset:small_moe")
    plan = random_plan(model, evicted=EVICTED)
    save_cut(model, tmp_path / "cut", plan=plan, bits=bits)
    assert_bytes(sizes.num_bytes(widths_of(plan)), folder=tmp_path / "cut", stored=headers_of(tmp_path / "cut"))


def test_active_parameters_as_measured():
    model = tiny_model("qwen2_moe")
    plan = random_plan(model, evicted=EVICTED)
    apply_plan(model, plan=plan)
    # Every expert that stays is used equally often: 2 of 6, and 2 of 7.
    usage = [
        torch.tensor([2 / alive if width else 0.0 for width in own], dtype=torch.float64)
        for own, alive in zip(widths_of(plan), (6, 7), strict=True)
    ]
    sizes = sizes_of(model.config, bits=16)
    found = sizes.active_params(widths_of(plan), usage=usage)
    assert found == pytest.approx(measure_footprint(model).active_params)


def test_qwen3_30b_in_no_time():
    config = AutoConfig.from_pretrained(Path(__file__).parent / "model_configs" / "qwen3_30b_a3b.json")
    dense = sizes_of(config, bits=16, dtype=torch.bfloat16)
    assert dense.stored_params(dense.dense) == 30_532_122_624
    assert dense.num_bytes(dense.dense) == pytest.approx(2 * 30_532_122_624, rel=1e-4)
    packed = sizes_of(config, bits=4, dtype=torch.bfloat16)
    quarter_gone = packed.num_bytes([[576] * 128] * 48)
    assert dense.num_bytes(dense.dense) / quarter_gone == pytest.approx(4.70, abs=0.01)


def test_what_is_refused():
    config = tiny_model().config
    with pytest.raises(ValueError, match="`bits` must be 16, or 4 for NF4, got 8"):
        sizes_of(config, bits=8)
    with pytest.raises(ValueError, match="multiple of 64, got 40"):
        sizes_of(tiny_model(hidden_size=40).config, bits=4)
    sizes = sizes_of(config, bits=16)
    with pytest.raises(ValueError, match="of another model: hidden size 64 and 2 MoE layers"):
        sizes.check_fits(make_shape(hidden=128))
    other = make_shape(num_experts=16, width=32)
    with pytest.raises(ValueError, match=r"has 8 experts of at most 32 channels, the statistics have 16 of at most 32"):
        sizes.check_fits(other)
