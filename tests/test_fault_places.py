"""NaN and infinity in calibration, repair and teaching are refused with the layer and the expert where they begin."""

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from tiny_runs import save_model, save_text, text_module

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.gram import iterate_grams
from lightning_moe.calibration.nonfinite import NonFiniteError
from lightning_moe.calibration.streamed import collect_streamed
from lightning_moe.export.folders import open_folder
from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts
from lightning_moe.training.teach import make_manifest, prepare_folder, write_teacher_logits

pytestmark = pytest.mark.fault

BATCHES = [{"input_ids": random_tokens(batch=4, length=24, seed=seed)} for seed in range(2)]


def in_weights(model, *, value=float("nan")):
    moe_layers(model)[1].experts.down_proj[3, 0, 0] = value


def in_gate(model):
    moe_layers(model)[1].experts.gate_up_proj[3, 5, 0] = float("inf")


def overflow(model):
    """1e25 times 1e25 is no fp32 number, and each of them is."""
    moe_layers(model)[1].experts.gate_up_proj[3] = 1e25


def in_two_experts(model):
    for expert in (0, 6):
        moe_layers(model)[0].experts.down_proj[expert] *= float("nan")


def in_router(model):
    moe_layers(model)[0].router.weight[2, 0] = float("nan")


def before_the_block(model):
    model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")


PLACES = [
    (in_weights, "model.layers.1.mlp.experts", "expert 3, whose weights are not finite"),
    (in_gate, "model.layers.1.mlp.experts", "expert 3, whose weights are not finite"),
    (overflow, "model.layers.1.mlp.experts", "expert 3, whose weights are finite (an overflow)"),
    (in_two_experts, "model.layers.0.mlp.experts", "experts 0, 6, whose weights are not finite"),
    (in_router, "model.layers.0.mlp.experts", "its router, whose weights are not finite"),
    (before_the_block, "model.layers.1.mlp.experts", "what goes into its router"),
]


@pytest.mark.parametrize(("spoil", "layer", "place"), PLACES)
@pytest.mark.parametrize("moments", [False, True])
def test_calibration_names_where_it_begins(spoil, layer, place, moments):
    model = tiny_model()
    with torch.no_grad():
        spoil(model)
    with pytest.raises(NonFiniteError) as caught:
        collect_statistics(model, loaders={"code": BATCHES}, progress=False, moments=moments)
    assert (caught.value.layer, caught.value.place) == (layer, place)
    assert str(caught.value).startswith(f"{layer}: NaN or infinity in batch 1 of corpus 'code', first in {place}. ")


def test_an_expert_that_breaks_in_a_later_batch_is_named_there():
    """Sums hold every batch so far; only the last can have broken them."""
    model = tiny_model()

    def batches():
        yield BATCHES[0]
        with torch.no_grad():
            in_weights(model)
        yield BATCHES[1]

    with pytest.raises(NonFiniteError, match=r"in batch 2 of corpus 'code', first in expert 3, whose weights"):
        collect_statistics(model, loaders={"code": batches()}, progress=False)


def test_an_output_that_overflows_is_told_from_its_experts():
    model = tiny_model()
    moe_layers(model)[0].decoder_layer.register_forward_hook(lambda module, args, output: output * float("inf"))
    with pytest.raises(NonFiniteError, match="first in the sum of its experts or the output of the decoder layer"):
        collect_statistics(model, loaders={"code": BATCHES}, progress=False)


@pytest.mark.parametrize("packed", [False, True])
def test_adapted_and_packed_experts_are_named_too(packed):
    model = tiny_model()
    convert_experts(model)
    if packed:
        quantize_model(model)
    inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=2))
    with torch.no_grad():
        for name, value in moe_layers(model)[1].experts.named_parameters():
            if "lora_B" in name and "down" in name:
                value.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.experts: .* first in experts 0, .*are not finite"):
        collect_statistics(model, loaders={"code": BATCHES}, progress=False)


def test_a_walk_through_a_folder_names_the_expert_in_float16(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        moe_layers(model)[1].experts.gate_up_proj[3] = 6e3
    model.save_pretrained(tmp_path / "model")
    folder = open_folder(str(tmp_path / "model"), dtype="float16")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: .*expert 3, whose weights are finite.*bfloat16"):
        collect_streamed(folder, loaders={"a": BATCHES}, workspace=tmp_path / "work", progress=False)
    wide = open_folder(str(tmp_path / "model"), dtype="bfloat16")  # as it advises, and nothing is in its way
    statistics = collect_streamed(wide, loaders={"a": BATCHES}, workspace=tmp_path / "work", progress=False)
    assert float(statistics.corpora["a"][1]["max_abs"][3]) > torch.finfo(torch.float16).max


@pytest.mark.parametrize("spoil", [in_gate, overflow])
def test_a_repair_does_not_fit_to_nan(spoil):
    model = tiny_model()
    with torch.no_grad():
        spoil(model)
    grams = iterate_grams(model, loaders={"code": BATCHES}, progress=False)
    assert next(grams).layer_index == 0
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: NaN or infinity in the activations that its down"):
        next(grams)


def test_a_teacher_that_gives_nan_writes_no_targets(tmp_path):
    save_text(tmp_path)
    save_model(tmp_path / "model")
    rows = text_module(tmp_path).rows("train")
    manifest = make_manifest(rows, teacher="t", quantize="none", vocab_size=4096, k=4, shard_rows=4)
    prepare_folder(tmp_path / "logits", manifest=manifest)
    model = tiny_model(vocab_size=4096)
    arguments = {"rows": rows, "manifest": manifest, "folder": tmp_path / "logits", "batch_size": 2, "progress": False}
    good = model.lm_head.weight.detach().clone()
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"The teacher gives NaN on row 0 of corpus 'a'\. Look at its weights"):
        write_teacher_logits(model, **arguments)
    assert [path.name for path in (tmp_path / "logits").iterdir()] == ["manifest.json"]
    model.lm_head.weight.data = good
    write_teacher_logits(model, **arguments)
    assert len(list((tmp_path / "logits").glob("*.safetensors"))) == -(-len(rows["a"]) // 4)
