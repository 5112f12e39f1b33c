"""What only a GPU can show; run by scripts/gpu_check.sh, skipped where there is none.

C channels, H hidden.
"""

import copy
import logging
import time
import warnings
from itertools import pairwise

import pytest
import torch
from cli_runs import quickstart, save_job
from tiny_models import random_tokens, tiny_model
from transformers import Qwen3MoeForCausalLM

from lightning_moe.adapters.groups import trainable_groups
from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.allocation import build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.discovery import expert_widths, moe_layers
from lightning_moe.models.grouped import grouped_matmul, grouped_outer
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.surgery.cut import apply_plan
from scripts.profile_step import large_config

log = logging.getLogger(__name__)

DEVICE = "cuda"
GIB = 2**30
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def batches(*, num_batches=3):
    ids = [random_tokens(batch=2, length=32, seed=seed) for seed in range(num_batches)]
    return [{"input_ids": value, "attention_mask": torch.ones_like(value), "labels": value} for value in ids]


def on_device(batch):
    return {name: value.to(DEVICE) for name, value in batch.items()}


def adapted_model(*, expert_rank=4):
    """A tiny model, cut, packed on the CPU, with adapters that are not at their start."""
    model = tiny_model("qwen3_moe")
    statistics = collect_statistics(model, loaders={"text": batches()}, progress=False)
    apply_plan(model, plan=build_method("exact_global", align=8).plan(statistics, prune_ratio=0.5))
    quantize_model(model)
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=expert_rank, router_rank=2))
    generator = torch.Generator().manual_seed(3)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return peft_model.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_and_cutting_give_the_bits_of_the_cpu(dtype):
    weight_CH = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    index_C = torch.tensor([0, 5, 6, 40, 95])
    on_cpu, on_gpu = PackedRows.pack(weight_CH), PackedRows.pack(weight_CH.to(DEVICE))
    pairs = ((on_cpu, on_gpu), (on_cpu.select(index_C), on_gpu.select(index_C.to(DEVICE))))
    for expected, packed in pairs:
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(packed.state_dict()[name].cpu(), value, rtol=0, atol=0, msg=name)
        rows = packed.rows(0, packed.shape[0], torch.float32).cpu()
        torch.testing.assert_close(rows, expected.rows(0, expected.shape[0], torch.float32), rtol=0, atol=0)


def test_calibration_agrees_with_the_cpu():
    model = tiny_model("deepseek_v2")
    expected = collect_statistics(model, loaders={"text": batches()}, progress=False).total()
    found = collect_statistics(model.to(DEVICE), loaders={"text": batches()}, progress=False).total()
    for layer, reference in zip(found, expected, strict=True):
        for name, value in reference.items():
            torch.testing.assert_close(layer[name], value, rtol=1e-3, atol=1e-6 * float(value.abs().max()), msg=name)


def test_forward_and_backward_agree_with_the_cpu_in_float32():
    model = adapted_model()
    expected = gradients(copy.deepcopy(model), batches()[0])
    found = gradients(model.to(DEVICE), on_device(batches()[0]))
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-3, atol=1e-4 * float(value.abs().max()), msg=name)


def test_bf16_mixed_forward_and_backward_stay_within_bf16_rounding():
    """Stated tolerance: losses 1 %, each gradient within a cosine of 0.98 of the CPU's in float32."""
    model = adapted_model()
    expected = gradients(copy.deepcopy(model), batches()[0])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = gradients(model.to(DEVICE), on_device(batches()[0]))
    torch.testing.assert_close(found["loss"].cpu(), expected["loss"], rtol=1e-2, atol=0)
    for name, value in expected.items():
        cosine = torch.cosine_similarity(found[name].float().cpu().flatten(), value.flatten(), dim=0)
        assert float(cosine) > 0.98, (name, float(cosine))


def gradients(model, batch):
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": loss.detach(), **{name: grad for name, grad in found.items() if grad is not None}}


def test_greedy_generation_gives_the_tokens_of_the_cpu():
    model = adapted_model().eval()
    prompt = random_tokens(batch=2, length=8, seed=5)
    expected = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
    found = model.to(DEVICE).generate(input_ids=prompt.to(DEVICE), max_new_tokens=8, do_sample=False)
    assert torch.equal(found.cpu(), expected)


@torch.no_grad()
def test_generation_in_bf16_stays_close_on_the_shipped_model():
    """Stated tolerance: the median log-probability within 0.15 nats of the CPU's in float32."""
    prompt = torch.arange(5, 69).unsqueeze(0)
    reference = load_model("asset:small_moe", dtype="float32")
    model = load_model("asset:small_moe", dtype="bfloat16").to(DEVICE)
    expected = reference(input_ids=prompt).logits.log_softmax(-1)
    found = model(input_ids=prompt.to(DEVICE)).logits.float().cpu().log_softmax(-1)
    assert float((found - expected).abs().median()) < 0.15
    assert model.generate(prompt.to(DEVICE), max_new_tokens=8, do_sample=False).shape == (1, 72)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_layer_waits_for_the_host_once(adapted, dtype):
    """The offsets of the routed pairs come to the host once a layer and forward; backward needs nothing more."""
    peft_model = adapted_model().to(DEVICE)
    model = peft_model.get_base_model() if adapted else peft_model.unload()
    layer = moe_layers(model)[0]
    hidden_TH = torch.randn(40, model.config.hidden_size, device=DEVICE, dtype=dtype, requires_grad=adapted)
    widths = expert_widths(layer.experts.experts if adapted else layer.experts)
    index_TK = torch.randint(len(widths), (40, 2), device=DEVICE)
    weights_TK = torch.rand(40, 2, device=DEVICE, dtype=dtype)
    layer.experts(hidden_TH, index_TK, weights_TK)  # makes what is cached
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            output_TH = layer.experts(hidden_TH, index_TK, weights_TK)
            if adapted:
                output_TH.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]
    assert len(waits) == 1, waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_with_experts_that_have_no_pairs(dtype):
    bounds = (0, 0, 24, 24, 64, 64)
    generator = torch.Generator().manual_seed(0)
    left_Sm, right_Sn = (torch.randn(64, size, generator=generator).to(DEVICE, dtype) for size in (32, 128))
    weight_Gmn = torch.randn(5, 32, 128, generator=generator).to(DEVICE, dtype)
    loop_Sn = torch.cat([left_Sm[a:b] @ weight_Gmn[g] for g, (a, b) in enumerate(pairwise(bounds))])
    loop_Gmn = torch.stack([left_Sm[a:b].T @ right_Sn[a:b] for a, b in pairwise(bounds)])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(grouped_matmul(left_Sm, weight_Gmn, bounds), loop_Sn, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grouped_outer(left_Sm, right_Sn, bounds), loop_Gmn, rtol=tolerance, atol=tolerance)


def test_a_layer_of_qwen3_30b_goes_through_the_whole_job():
    """128 experts x 768 channels, hidden 2048, top-8: calibrate, cut half, pack, DoRA steps; peak memory and time."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen3MoeForCausalLM(large_config(vocab_size=4096)).to(torch.bfloat16).eval()
    ids = torch.randint(4096, (4, 1024))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    statistics = timed("calibrate 4,096 tokens", collect_statistics, model, loaders={"text": [batch]}, progress=False)
    plan = build_method("exact_global").plan(statistics, prune_ratio=0.5)
    timed("cut", apply_plan, model, plan=plan)
    timed("pack", quantize_model, model)
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=32, router_rank=4)).train()
    groups = trainable_groups(model)
    optimizer = torch.optim.AdamW([parameter for group in groups.values() for parameter in group], lr=1e-4)

    def step():
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = peft_model(**on_device(batch), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    first = timed("DoRA step, the first", step)
    second = timed("DoRA step, the second", step)
    assert second < first
    assert peak_gib() < 6.0


def timed(what, function, *args, **kwargs):
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(*args, **kwargs)
    torch.cuda.synchronize()
    log.warning("%s: %.0f ms, peak %.2f GiB", what, 1e3 * (time.perf_counter() - start), peak_gib())
    return result


def peak_gib():
    return torch.cuda.max_memory_allocated() / GIB


def test_the_whole_job_with_paged_8_bit_adamw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_job(tmp_path)
    flags = ("--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed")
    quickstart(tmp_path, *flags, "--model.init_args.optimizer", "paged_adamw8bit")
    assert (tmp_path / "fit" / "exports").is_dir()
