"""The serving benchmark: forms that say the same, caches that come back, widths that keep a budget."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_moe.models.discovery import expert_widths, moe_layers

SCRIPTS = Path(__file__).parents[1] / "scripts"
WIDTHS = (64, 128, 128, 64, 128, 128, 64, 64)


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_serve")


@pytest.fixture
def models(serve, monkeypatch):
    module = importlib.import_module("serve_models")
    small = {"hidden_size": 64, "num_experts": 8, "num_attention_heads": 4, "head_dim": 16, "num_experts_per_tok": 2}
    monkeypatch.setattr(module, "QWEN3_30B_A3B", module.QWEN3_30B_A3B | small)
    for name, value in {"HIDDEN": 64, "NUM_EXPERTS": 8, "WIDTH": 128, "VOCABULARY": 256}.items():
        monkeypatch.setattr(module, name, value)
    return module


def stack(models, variant, widths=WIDTHS, **options):
    torch.manual_seed(0)
    return models.build_stack(variant, widths=widths, num_layers=2, device="cpu", **options)


IDS_BS = torch.arange(24).view(2, 12)


def test_all_forms_of_an_uncut_stack_give_the_same_logits(models):
    whole = (128,) * 8
    dense = stack(models, "dense", whole)(IDS_BS).logits
    for variant, tolerance in [("padded", 0.0), ("ragged", 0.05), ("ragged, NF4", 1.5)]:
        logits = stack(models, variant, whole)(IDS_BS).logits
        torch.testing.assert_close(logits, dense, atol=tolerance, rtol=0)
    assert float(dense.detach().float().std()) > 0.5


def test_a_cut_stack_has_the_widths_and_less_bytes(models):
    forms = {variant: stack(models, variant) for variant in models.VARIANTS}
    assert all(expert_widths(layer.experts) == WIDTHS for layer in moe_layers(forms["ragged"]))
    sizes = [models.tensor_bytes(forms[variant]) for variant in models.VARIANTS]
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3]
    assert sizes[0] - sizes[2] == 2 * 3 * 64 * 2 * (8 * 128 - sum(WIDTHS))
    assert models.routed_share(forms["dense"], IDS_BS) == 128
    assert 64 < models.routed_share(forms["ragged"], IDS_BS) < 128


def test_layers_that_share_their_experts_say_the_same_in_less_memory(models):
    apart, together = stack(models, "ragged"), stack(models, "ragged", shared=True)
    assert models.tensor_bytes(together) < models.tensor_bytes(apart)
    # Random values are drawn in the order of the layers: the same for both.
    assert torch.equal(apart(IDS_BS).logits, together(IDS_BS).logits)


def test_decoding_gives_the_cache_back_and_repeats_itself(serve, models):
    model = stack(models, "ragged")
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].flatten().tolist()), with_kwargs=True
    )
    with torch.no_grad():
        cache = serve.prefill(model, IDS_BS)
        for _ in range(2):
            serve.decode(model, cache, IDS_BS[:, -1:], steps=3, implementation="eager")
            assert cache.get_seq_length() == IDS_BS.shape[1]
        hook.remove()
        again = model(input_ids=torch.cat([IDS_BS, IDS_BS[:, -1:]], 1)).logits[:, -1].argmax(-1)
    assert seen[1:4] == seen[4:7]
    assert seen[2] == again.tolist()


def test_speeds_are_measured_for_every_form(serve, models, monkeypatch):
    monkeypatch.setattr(serve.Traffic, "prompts", lambda self: IDS_BS)
    forms = {variant: stack(models, variant) for variant in ("dense", "ragged")}
    found = serve.speeds(forms, serve.Traffic(batch=2, prompt=12, answer=4), repeats=1)
    assert list(found) == ["dense", "ragged"]
    assert all(own["prefill"] > 0 and own["decode"] > 0 for own in found.values())
    assert found["ragged"]["kernels"] == "ours"


def test_memory_is_measured_of_every_model_in_a_quick_run_too(serve, models, monkeypatch):
    monkeypatch.setattr(serve, "in_child", lambda function, **what: {"weights": 1e6, "loaded": 2e6, "peak": 3e6})
    monkeypatch.setattr(serve.Traffic, "prompts", lambda self: IDS_BS)
    subject = serve.Subject(
        name="small",
        build=lambda variant, shared=False: stack(models, variant, shared=shared),
        traffics=(serve.Traffic(batch=1, prompt=12, answer=4), serve.Traffic(batch=8, prompt=12, answer=4)),
    )
    rows = serve.measure(subject, SimpleNamespace(quick=True))
    assert [(row["weights_MB"], row["loaded_MB"], row["peak_MB"]) for row in rows] == [("1", "2", "3")] * 4
    assert serve.ratios_of(rows)["small, ragged: loaded_MB"] == 1


def test_widths_keep_the_budget_and_drop_what_is_too_narrow(serve):
    module = importlib.import_module("serve_models")
    spread = module.Spread(logit_E=torch.zeros(128), kept_E=torch.linspace(0, 1, 128))
    for ratio, align, minimum in [(0.5, 64, 64), (0.25, 16, 0), (0.25, 128, 128), (0.5, 32, 128)]:
        widths = spread.widths(prune_ratio=ratio, align=align, minimum=minimum)
        assert all(width % align == 0 and (width == 0 or width >= minimum) for width in widths)
        assert max(widths) <= 768
        assert sum(widths) == pytest.approx((1 - ratio) * 768 * 128, rel=0.01)


def test_the_shipped_model_is_cut_alike_in_every_form(serve, tmp_path):
    module = importlib.import_module("serve_models")
    folders = module.save_shipped(tmp_path, module.shipped_statistics(), prune_ratio=0.5)
    assert tuple(folders) == module.VARIANTS
    with torch.no_grad():
        logits = [serve.load_form(name, folders=folders)(IDS_BS).logits.float() for name in module.VARIANTS]
    torch.testing.assert_close(logits[2], logits[1], atol=0.25, rtol=0)  # bf16 and other kernels
    assert float((logits[1] - logits[0]).abs().max()) > 1
