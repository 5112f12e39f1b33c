"""`torch.compile` of a pruned model: one graph without autograd, equal outputs, nothing of the experts frozen in it."""

import copy

import pytest
import torch
from pruned_models import SHIPPED, cut_model, logits, pruned_folder
from random_plans import random_plan
from tiny_models import MODEL_NAMES, random_tokens
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.nf4 import pack_experts
from lightning_moe.surgery.cut import apply_plan

IDS = random_tokens()
QUICK = ("qwen3_moe", "qwen3_next", "mixtral", "deepseek_v3_grouped", "ernie4_5_moe")  # routers of every kind
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*falling back.*"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counting(backend: str = "aot_eager") -> CompileCounterWithBackend:
    return CompileCounterWithBackend(backend)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        *(pytest.param(name, False, marks=() if name in QUICK else pytest.mark.slow) for name in MODEL_NAMES),
        ("qwen2_moe", True),
        ("deepseek_v2_grouped", True),
    ],
)
def test_inference_is_one_graph_and_gives_the_same_bits(name, packed):
    model = cut_model(name, packed=packed)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled, IDS), logits(model, IDS))


@pytest.mark.parametrize("packed", [False, True])
def test_inference_mode_and_autocast(packed):
    model = cut_model("qwen3_moe")
    for layer in moe_layers(model) if packed else ():
        pack_experts(layer.experts)  # and no Linear layers: bitsandbytes' own differ in the last bit under autocast
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = logits(compiled, IDS), logits(model, IDS)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)


# What the compiler itself does with an intermediate tensor at a break of the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_training_breaks_the_graph_and_gives_the_same_gradients():
    model = cut_model("qwen3_moe").train()
    compiled = torch.compile(model, backend="aot_eager")
    pairs = [
        torch.autograd.grad(one(input_ids=IDS, labels=IDS, use_cache=False).loss, list(model.parameters()))
        for one in (compiled, model)
    ]
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_layers_compiled_one_by_one_share_a_graph():
    """More layers than the compiler keeps variants of one function (8): they must not be told apart."""
    model, counter = cut_model("qwen3_moe"), counting("eager")
    first = model.model.layers[0]
    for index in range(2, 12):
        layer = copy.deepcopy(model.model.layers[index % 2])
        layer.self_attn.layer_idx = index
        model.model.layers.append(layer)
    expected = logits(model, IDS)
    assert first is model.model.layers[0]
    model.config.num_hidden_layers = 12
    expected = logits(model, IDS)
    for layer in model.model.layers:
        layer.compile(backend=counter)
    assert torch.equal(logits(model, IDS), expected)
    assert counter.frame_count <= 3


def test_a_copy_and_a_cut_model_are_other_modules():
    model = cut_model("qwen3_moe")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = logits(compiled, IDS)
    twin = copy.deepcopy(model)
    for layer in moe_layers(twin):
        layer.experts.get_parameter("down_proj.weight").data.mul_(2)
    compiled_twin = torch.compile(twin, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled_twin, IDS), logits(twin, IDS))
    assert not torch.equal(logits(twin, IDS), before)
    assert torch.equal(logits(compiled, IDS), before)
    apply_plan(model, plan=random_plan(model, seed=4))
    assert torch.equal(logits(compiled, IDS), logits(model, IDS))
    assert not torch.equal(logits(compiled, IDS), before)


def test_weights_trained_after_the_graph_was_made_count():
    model = cut_model("qwen3_moe")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = logits(compiled, IDS)
    moe_layers(model)[0].experts.get_parameter("down_proj.weight").data.mul_(2)
    assert torch.equal(logits(compiled, IDS), logits(model, IDS))
    assert not torch.equal(logits(compiled, IDS), before)


def test_other_tracers_are_refused_with_a_way_out():
    model = cut_model("qwen3_moe")
    inputs = {"input_ids": IDS, "use_cache": False}
    with pytest.raises(ValueError, match=r"cannot hold experts of unequal width.* Export it as `padded`"):
        torch.export.export(model, (), inputs, strict=False)
    layer = moe_layers(model)[0]
    arguments = (torch.randn(4, 64), torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"`torch.jit.trace` cannot hold"):
        torch.jit.trace(layer.experts, arguments)


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_generation_with_a_static_cache(packed, tmp_path):
    folder = pruned_folder(tmp_path / "model", SHIPPED, packed=packed)
    model, settings = AutoModelForCausalLM.from_pretrained(folder), {"do_sample": False, "max_new_tokens": 12}
    expected = model.generate(IDS, **settings)
    counter = counting("eager")
    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **settings), expected)
    assert counter.frame_count <= 4  # prefill, decode, and each once more with sizes that vary


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_the_default_backend(packed):
    model = cut_model(SHIPPED, packed=packed)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)
