"""What a repair says of itself: errors are per token of the text, and trust is by the tokens of each expert."""

from dataclasses import replace

import pytest
from random_plans import random_plan
from tiny_models import random_tokens, tiny_model

from lightning_moe.calibration.gram import iterate_grams
from lightning_moe.models.discovery import moe_layers
from lightning_moe.surgery.repair import plan_repair


@pytest.fixture(scope="module")
def prepared():
    model = tiny_model()
    loaders = {"text": [{"input_ids": random_tokens(batch=4, length=32)}]}
    grams = list(iterate_grams(model, loaders=loaders, progress=False))
    return model, random_plan(model, evicted=((2,), (0,))), grams, loaders


def test_errors_before_are_per_token_and_of_the_lost_channels(prepared):
    model, plan, grams, loaders = prepared
    repair = plan_repair(model, plan=plan, loaders=loaders, grams=grams, progress=False)
    for layer, gram in zip(moe_layers(model), grams, strict=True):
        total = 0.0
        for expert, kept in enumerate(plan.keep[layer.index].view(8, 32)):
            if bool(kept.any()):
                lost_Hd = layer.experts.down_proj[expert][:, ~kept].detach()
                gram_dd = (gram.half_a[expert] + gram.half_b[expert])[~kept][:, ~kept]
                total += float((lost_Hd @ gram_dd @ lost_Hd.T).trace())
        assert repair.error_before[layer.index] == pytest.approx(total / (4 * 32), rel=1e-4)


def test_experts_that_saw_one_token_stay_as_they_are(prepared):
    model, plan, grams, loaders = prepared
    few = [replace(gram, counts=(1,) * 8, num_tokens=10_000) for gram in grams]
    assert plan_repair(model, plan=plan, loaders=loaders, grams=few, progress=False).num_repaired == (0, 0)
    many = [replace(gram, counts=(10_000,) * 8, num_tokens=1) for gram in grams]
    assert sum(plan_repair(model, plan=plan, loaders=loaders, grams=many, progress=False).num_repaired) > 0
