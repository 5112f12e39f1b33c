"""How a reload is compared: by hand, and where a close choice of experts falls the other way."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from lightning_moe.export.comparing import Comparison, Probe, check_stock_classes
from lightning_moe.models.discovery import moe_layers
from lightning_moe.surgery.cut import convert_experts


def probe(logits, chosen, *, num_experts=4):
    return Probe(logits_BSV=torch.tensor([logits]), chosen=(torch.tensor(chosen),), num_experts=(num_experts,))


def test_by_hand():
    """Three tokens: differences 0.5, 0.1 and 4; only the last goes to other experts."""
    before = probe([[1.0, 2.0], [3.0, 4.0], [8.0, 6.0]], [[0, 1], [1, 2], [0, 3]])
    after = probe([[1.5, 2.1], [3.0, 4.1], [4.0, 6.0]], [[0, 1], [1, 2], [1, 3]])
    found = Comparison.of(before, after)
    assert found.max_logit_diff == 4
    assert found.median_logit_diff == pytest.approx(0.5)
    assert found.rerouted == pytest.approx(1 / 3)
    assert found.describe() == (
        "largest logit difference after reload 4.0e+00 (median over tokens 5.0e-01, 33.3% of tokens go to other "
        "experts)"
    )
    # The largest logit is 8: 5 % of it is 0.4, 0.1 % is 0.008.
    with pytest.raises(ValueError, match=r"'here' does not reproduce the model: logits differ by 0\.5, allowed 0\.4"):
        found.check(Path("here"), before=before, rounded=True)
    with pytest.raises(ValueError, match=r"logits differ by 4, allowed 0\.008"):
        found.check(Path("here"), before=before, rounded=False)


def test_the_median_decides_where_storing_rounds():
    before = probe([[1.0, 2.0], [3.0, 4.0], [8.0, 6.0]], [[0, 1], [1, 2], [0, 3]])
    after = probe([[1.0, 2.0], [3.0, 4.1], [4.0, 6.0]], [[0, 1], [1, 2], [1, 3]])
    Comparison.of(before, after).check(Path("here"), before=before, rounded=True)


def test_experts_that_are_counted_anew_are_not_compared():
    logits, chosen = [[1.0, 2.0]], [[0, 1]]
    found = Comparison.of(probe(logits, chosen), probe(logits, chosen, num_experts=3))
    assert found.rerouted is None
    assert "other experts" not in found.describe()


def test_tokens_whose_choice_was_close_are_counted():
    """Against transformers' own router logits."""
    model, other, generator = tiny_model(), tiny_model(), torch.Generator().manual_seed(1)
    for layer in moe_layers(other):
        layer.router.get_parameter("weight").data += 0.02 * torch.randn(8, 64, generator=generator)
    ids = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [each(input_ids=ids, output_router_logits=True).router_logits for each in (model, other)]
    chosen = [[layer.topk(2).indices.sort().values for layer in own] for own in logits]
    moved = torch.stack([(one != two).any(-1) for one, two in zip(*chosen, strict=True)]).any(0)
    found = Comparison.of(Probe.of(model), Probe.of(other))
    assert 0 < moved.float().mean() < 1
    assert found.rerouted == pytest.approx(float(moved.float().mean()))


def test_a_probe_leaves_no_hooks_and_keeps_the_mode():
    model = tiny_model().train()
    Probe.of(model)
    assert model.training
    assert not any(layer.router._forward_hooks for layer in moe_layers(model))


def test_classes_of_this_package_do_not_pass_as_stock():
    check_stock_classes(Path("here"), tiny_model())
    model = tiny_model()
    convert_experts(model)
    with pytest.raises(
        ValueError, match=r"without `import lightning_moe`: 'model\.layers\.0\.mlp\.experts' is of this"
    ):
        check_stock_classes(Path("here"), model)
