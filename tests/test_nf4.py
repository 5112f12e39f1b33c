"""NF4 rows: exact under cuts, as good as bitsandbytes' own, and no larger than stated."""

# C channels, H hidden, B blocks of 64 in a row

import gc
import weakref

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from random_plans import random_plan
from tiny_models import MODEL_NAMES, tiny_model
from torch import Tensor, nn

from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts, DenseRows
from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.linears import linears_to_pack, quantize_model
from lightning_moe.quantization.nf4 import PackedRows, pack_experts, unpack_experts
from lightning_moe.surgery.cut import apply_plan, convert_experts


def gaussian(num_rows: int, hidden_size: int) -> Tensor:
    return torch.randn(num_rows, hidden_size, generator=torch.Generator().manual_seed(0))


def dequantised(rows: PackedRows) -> Tensor:
    return rows.rows(0, rows.shape[0], torch.float32)


def assert_same_rows(one: PackedRows, other: PackedRows) -> None:
    for (name, value), (_, expected) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert value.dtype == expected.dtype, name
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("hidden_size", [64, 192])
def test_selecting_packed_rows_is_packing_selected_rows(hidden_size) -> None:
    weight_CH = gaussian(40, hidden_size)
    index_C = torch.randperm(40)[:17]
    assert_same_rows(PackedRows.pack(weight_CH).select(index_C), PackedRows.pack(weight_CH[index_C]))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3_grouped", "ernie4_5_moe"])
def test_cutting_a_packed_model_is_packing_a_cut_one(name) -> None:
    overrides = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2} if name.endswith("grouped") else {}
    packed_first, cut_first = tiny_model(name, **overrides), tiny_model(name, **overrides)
    plan = random_plan(cut_first, evicted=((2,), (0, 7)))
    convert_experts(packed_first)
    quantize_model(packed_first)
    apply_plan(packed_first, plan=plan)
    apply_plan(cut_first, plan=plan)
    quantize_model(cut_first)
    expected = cut_first.state_dict()
    assert list(packed_first.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in packed_first.state_dict().items())


def test_error_is_that_of_full_precision_absmax() -> None:
    weight_CH = gaussian(512, 2048)
    codes, state = quantize_4bit(weight_CH, blocksize=64, quant_type="nf4")
    plain = (dequantize_4bit(codes, state) - weight_CH).norm() / weight_CH.norm()
    ours = (dequantised(PackedRows.pack(weight_CH)) - weight_CH).norm() / weight_CH.norm()
    assert float(ours) == pytest.approx(0.092, abs=0.001)
    assert ours < 1.005 * plain


@pytest.mark.parametrize(("hidden_size", "bits"), [(64, 4 + 8 / 64 + 32 / 64), (2048, 4.140625)])
def test_bits_per_weight_are_as_stated(hidden_size, bits) -> None:
    packed = PackedRows.pack(gaussian(10, hidden_size))
    stored = sum(value.numel() * value.element_size() for value in packed.state_dict().values())
    assert 8 * stored / (10 * hidden_size) == bits
    assert packed.shape == (10, hidden_size)


def test_one_block_per_row_keeps_its_largest_value() -> None:
    weight_CH = gaussian(20, 64)
    rows_CH = dequantised(PackedRows.pack(weight_CH))
    largest_C = weight_CH.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(rows_CH.gather(1, largest_C), weight_CH.gather(1, largest_C))


def test_zero_rows_stay_zero_and_no_rows_stay_none() -> None:
    weight_CH = gaussian(4, 128)
    weight_CH[1] = 0
    weight_CH[2, :64] = 0
    rows_CH = dequantised(PackedRows.pack(weight_CH))
    assert rows_CH[1].abs().max() == 0
    assert rows_CH[2, :64].abs().max() == 0
    assert rows_CH.isfinite().all()
    assert PackedRows.pack(weight_CH[:0]).rows(0, 0, torch.float32).shape == (0, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows_come_in_the_asked_type_whatever_the_range(dtype) -> None:
    packed = PackedRows.pack(gaussian(12, 128))
    rows_nH = packed.rows(3, 9, dtype)
    assert rows_nH.dtype == dtype
    torch.testing.assert_close(rows_nH.float(), dequantised(packed)[3:9], rtol=1e-2, atol=1e-3)
    blocks = packed.blocks([5, 0, 7])
    assert torch.equal(blocks[2](1, 4, torch.float32), packed.rows(6, 9, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_moving_to_another_type_leaves_packed_rows_alone(dtype) -> None:
    packed = PackedRows.pack(gaussian(12, 128))
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    moved = nn.Sequential(packed).to(dtype)[0]
    assert all(torch.equal(value, before[name]) for name, value in moved.state_dict().items())
    assert moved.scale.dtype == torch.float32
    assert moved.to("meta").scale.dtype == torch.float32


def test_packing_twice_changes_nothing_and_unpacking_gives_the_rows() -> None:
    experts = ChannelExperts(
        widths=(4, 2), hidden_size=64, act_fn=nn.SiLU(), rows=lambda rows, hidden: DenseRows(gaussian(rows, hidden))
    )
    pack_experts(experts)
    first = {name: experts.projection(name) for name in PROJECTIONS}
    pack_experts(experts)
    assert all(experts.projection(name) is rows for name, rows in first.items())
    unpack_experts(experts, dtype=torch.bfloat16)
    expected = first["up_proj"].rows(0, 6, torch.bfloat16)
    assert torch.equal(experts.projection("up_proj").get_parameter("weight"), expected)
    assert not experts.packed


def test_hidden_size_must_be_whole_blocks() -> None:
    match = "multiple of 64, got 96. Keep this model in 16 bit"
    with pytest.raises(ValueError, match=match):
        PackedRows.pack(gaussian(4, 96))
    model = tiny_model(hidden_size=96)
    convert_experts(model)
    with pytest.raises(ValueError, match=match):
        quantize_model(model)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())


def test_stock_experts_are_not_quantised() -> None:
    model = tiny_model()
    apply_plan(model, plan=random_plan(model))
    layer = moe_layers(model)[1]
    layer.block.set_submodule("experts", moe_layers(tiny_model())[1].experts)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.experts' has stock experts: call `convert_experts`"):
        quantize_model(model)
    assert not moe_layers(model)[0].experts.packed


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_attention_shared_experts_and_dense_mlps_are_packed_and_nothing_else(name) -> None:
    model = tiny_model(name)
    convert_experts(model)
    layers = moe_layers(model)
    shared = tuple(f"{prefix}." for layer in layers for prefix in layer.shared_names)
    dense_mlp = tuple(
        f"{module_name}."
        for module_name, _ in model.named_modules()
        if module_name.endswith(".mlp") and module_name not in {layer.block_name for layer in layers}
    )
    linears = [module_name for module_name, module in model.named_modules() if isinstance(module, nn.Linear)]
    attention = [module_name for module_name in linears if "_attn." in module_name]
    inside = [module_name for module_name in linears if module_name.startswith(shared + dense_mlp)]
    assert sorted(linears_to_pack(model)) == sorted(attention + inside)
    quantize_model(model)
    packed = [module_name for module_name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert sorted(packed) == sorted(attention + inside)
    assert not {module.weight.dtype for name, module in model.named_modules() if name.endswith("expert_gate")} - {
        torch.float32
    }
    assert type(model.get_output_embeddings()) is nn.Linear
    assert all(layer.experts.packed for layer in layers)
    assert all(layer.router.weight.dtype == torch.float32 for layer in layers)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert linears_to_pack(model) == []


def test_memory_is_given_back_projection_by_projection(monkeypatch) -> None:
    model = tiny_model(num_hidden_layers=4)
    convert_experts(model)
    dense = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, DenseRows)]
    alive: list[int] = []
    pack = PackedRows.pack.__func__

    def counting(cls: type[PackedRows], weight_CH: Tensor) -> PackedRows:
        gc.collect()
        alive.append(sum(reference() is not None for reference in dense))
        return pack(cls, weight_CH)

    monkeypatch.setattr(PackedRows, "pack", classmethod(counting))
    quantize_model(model)
    gc.collect()
    assert alive == list(range(12, 0, -1))
    assert all(reference() is None for reference in dense)


@pytest.mark.parametrize("broken", ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.up_proj"])
def test_a_weight_that_is_not_finite_is_refused(broken) -> None:
    model = tiny_model("qwen3_moe")
    convert_experts(model)
    name = broken if broken.endswith("weight") else f"{broken}.weight"
    model.get_parameter(name).data[3, 5] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or infinity, for which there is no 4-bit code"):
        quantize_model(model)
