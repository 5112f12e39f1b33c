"""The active share a plan foretells against what the cut model's own router does, on text it was not calibrated on."""

import json

import pytest
import torch

from lightning_moe.allocation import ExactGlobal, build_method
from lightning_moe.allocation.budgets import Budget, spend_budget
from lightning_moe.allocation.usage import active_channels, usage_shares
from lightning_moe.assets import asset_path
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.loading import load_model
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.training.tokenization import load_tokenizer


def rows(domain, *, part):
    """Eight rows of 256 tokens of a domain, part 0 or 1."""
    lines = asset_path(f"text/{domain}/recovery.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    tokenizer, tokens = load_tokenizer("asset:small_moe"), []
    for line in lines:
        tokens += tokenizer(json.loads(line)["text"])["input_ids"]
    chosen = torch.tensor(tokens[part * 2048 : (part + 1) * 2048])
    return [{"input_ids": chosen.view(8, 256)}]


def statistics_of(model, *, part):
    loaders = {domain: rows(domain, part=part) for domain in ("code", "glosses", "math")}
    return collect_statistics(model, loaders=loaders)


def measured_share(plan, *, dense):
    """Channels a token uses in the cut model, over those it uses in the dense one."""
    model = load_model("asset:small_moe", dtype="float32")
    apply_plan(model, plan=plan)
    cut = statistics_of(model, part=1)
    left, whole = (
        active_channels([layer.widths for layer in own.shape.layers], usage=usage_shares(own)) for own in (cut, dense)
    )
    return left / whole


@pytest.mark.slow
def test_the_foretold_share_is_what_the_router_does():
    calibrated = statistics_of(load_model("asset:small_moe", dtype="float32"), part=0)
    dense = statistics_of(load_model("asset:small_moe", dtype="float32"), part=1)
    for method in (ExactGlobal(), build_method("paper_a")):
        spent = spend_budget(method, calibrated, budget=Budget(active=0.6))
        assert measured_share(spent.plan, dense=dense) == pytest.approx(spent.reached["active"], rel=0.05)
    # Whole experts leave a token's work as it was.
    whole = spend_budget(build_method("reap"), calibrated, budget=Budget(keep_ratio=0.5))
    assert whole.reached["active"] == pytest.approx(1.0)
    assert measured_share(whole.plan, dense=dense) == pytest.approx(1.0)
