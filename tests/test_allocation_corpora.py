"""A choice of corpora: every plan, budget and novice is what statistics give that hold no other corpus."""

from dataclasses import replace

import pytest
import torch
from statistics_factory import make_statistics

from lightning_moe.allocation.budgets import Budget, spend_budget
from lightning_moe.allocation.methods import PRESETS, ExactGlobal, build_method
from lightning_moe.records import STATISTICS
from lightning_moe.surgery.novices import mean_outputs

CHOSEN = ["code", "text"]  # in another order than in the file
WORTHLESS = 5
VARIANTS = [(name, {}) for name in PRESETS] + [
    ("exact_global", {"usage_weight": 1.0}),
    ("paper_a", {"smoothing": "none", "expert_weight": "ablation"}),
    ("channel_coverage", {"order": "tokens", "normalise": "tokens"}),
    ("tb_coverage", {"fill": "pooled", "protected_share": 0.0}),
    ("tb_coverage", {"order": "tokens", "fill": "mean"}),
    ("frequency", {"scope": "global"}),
    ("expert_sparsity", {"max_subsets": 0}),
]


def loud_statistics():
    """Three corpora; the third is a hundred times as loud, and alone thinks much of an expert of the second layer."""
    made = make_statistics(num_layers=3, corpora=("text", "noise", "code"), optional=True, width=16)
    corpora = {}
    for corpus, layers in made.corpora.items():
        noisy, turned = corpus == "noise", []
        for index, layer in enumerate(layers):
            values = {name: value * (100 if noisy and name != "num_tokens" else 1) for name, value in layer.items()}
            values["output_gram"] = values["output_gram"] @ values["output_gram"].T
            if index == 1:
                values = {name: _turned(name, value, noisy=noisy) for name, value in values.items()}
            turned.append(values)
        corpora[corpus] = tuple(turned)
    return replace(made, corpora=corpora)


def _turned(name, value, *, noisy):
    """The expert's numbers: next to nothing, but for its largest output in the loud corpus."""
    factor = (1e6 if name == "max_abs" else 1.0) if noisy else 1e-9
    size = {"C": 16, "E": 1, "EH": 1}.get(STATISTICS[name].dims)
    if size is None or name == "count":
        return value
    value = value.clone()
    value[WORTHLESS * size : (WORTHLESS + 1) * size] *= factor
    return value


@pytest.fixture(scope="module")
def both():
    """The statistics, and those that never saw the loud corpus."""
    loud = loud_statistics()
    return loud, replace(loud, corpora={name: loud.corpora[name] for name in CHOSEN})


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_plan_of_some_corpora_does_not_see_the_others(both, name, settings):
    loud, quiet = both
    align = {"align": 4} if "align" in PRESETS[name].known else {}
    align |= {"min_width": 4} if "min_width" in PRESETS[name].known else {}
    method = build_method(name, **settings, **align)
    plan = method.plan(loud, prune_ratio=0.5, corpora=CHOSEN)
    assert plan.digest == method.plan(quiet, prune_ratio=0.5).digest
    assert plan.provenance["corpora"] == "code, text"
    blind = name in ("random", "magnitude", "aimer", "uniform") and not settings
    if not blind:
        assert plan.digest != method.plan(loud, prune_ratio=0.5).digest


def test_a_budget_of_some_corpora_does_not_see_the_others(both):
    loud, quiet = both
    budget, method = Budget(active=0.5, keep_ratio=0.6), ExactGlobal(align=4)
    found = spend_budget(method, loud, budget=budget, corpora=CHOSEN, progress=False)
    alone = spend_budget(method, quiet, budget=budget, progress=False)
    assert found.plan.digest == alone.plan.digest
    assert (found.reached, found.before, found.binding) == (alone.reached, alone.before, alone.binding)
    assert found.reached != spend_budget(method, loud, budget=budget, progress=False).reached


def test_novices_of_some_corpora_do_not_see_the_others(both):
    loud, quiet = both
    plan = build_method("frequency").plan(quiet, prune_ratio=0.5)
    found, alone = mean_outputs(loud, plan=plan, corpora=CHOSEN), mean_outputs(quiet, plan=plan)
    assert all(torch.equal(one, other) for one, other in zip(found.rows, alone.rows, strict=True))
    assert not torch.equal(found.rows[0], mean_outputs(loud, plan=plan).rows[0])
