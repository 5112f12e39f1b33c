"""The guides, followed to the letter: a criterion and a family that the package does not have."""

# C channels of a layer, E experts, n channels of an expert

import json

import pytest
import torch
from docs_pages import ROOT, blocks
from docs_runner import make_workplace, own_tables, run_page
from random_plans import random_plan
from tiny_models import random_tokens
from transformers import AutoModelForCausalLM

from lightning_moe import cli
from lightning_moe.criteria import CHANNEL_CRITERIA
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.families import FAMILIES
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.surgery.cut import apply_plan

pytestmark = pytest.mark.docs

CRITERIA, MODELS = (ROOT / "lightning_moe" / name / "README.md" for name in ("criteria", "models"))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    with own_tables():
        yield make_workplace(tmp_path, monkeypatch=monkeypatch)


@pytest.mark.parametrize("page", [CRITERIA, MODELS], ids=["criterion", "family"])
def test_the_code_is_short(page):
    (own,) = (block for block in blocks(page) if block.says.get("file", "").startswith("my_"))
    assert len(own.text.splitlines()) < 30


def test_a_criterion_of_ones_own(workplace):
    run_page(CRITERIA)
    assert "output_energy" not in CHANNEL_CRITERIA  # it was another program
    plan, statistics = PrunePlan.load("plan.json"), CalibrationStatistics.load("statistics.safetensors")
    assert json.loads(plan.provenance["settings"])["criterion"] == "output_energy"
    assert plan.num_kept == plan.shape.num_channels // 2
    for layer, keep_C in enumerate(plan.keep):
        sums, weights = statistics.total(None)[layer], statistics.weights[layer]
        score_C, widths = sums["weighted_sq"] * weights["down_sq_norm"], plan.shape.layers[layer].widths
        assert int(keep_C.sum()) == len(keep_C) // 2
        for keep_n, score_n in zip(keep_C.split(widths), score_C.split(widths), strict=True):
            best = score_n.topk(int(keep_n.sum())).indices
            assert keep_n.nonzero().flatten().tolist() == sorted(best.tolist())


@torch.no_grad()
def test_a_family_of_ones_own(workplace, capsys):
    packed = run_page(MODELS)["model"]
    assert "dots1" in FAMILIES
    plan = PrunePlan.load("plan.json")
    for layer in moe_layers(packed):
        assert isinstance(layer.experts, ChannelExperts)
        assert isinstance(layer.experts.gate_proj, PackedRows)
        assert sum(layer.experts.widths) == int(plan.keep[layer.index].sum())
    assert packed.generate(random_tokens(batch=1, length=5), max_new_tokens=3, do_sample=False).shape == (1, 8)

    # A real cut is the stock model with the other channels at zero.
    cut, masked = (AutoModelForCausalLM.from_pretrained("tiny_dots") for _ in range(2))
    some = random_plan(cut, evicted=((), ()))
    for layer, keep_C in zip(moe_layers(masked), some.keep, strict=True):
        down_EHn = layer.experts.down_proj
        down_EHn *= keep_C.view(len(down_EHn), 1, -1)
    apply_plan(cut, plan=some)
    ids = random_tokens()
    torch.testing.assert_close(cut(ids).logits, masked(ids).logits, rtol=1e-4, atol=1e-5)

    with pytest.raises(SystemExit, match="1"):
        cli.main(["export", "--model", "tiny_dots", "--out", "deployed", "--formats", "[stock]"])
    assert (
        "of model type 'dots1' is not described in `lightning_moe/export/stock_layouts.py`" in capsys.readouterr().err
    )
