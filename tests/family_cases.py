"""Every family and variant as a test case: parametrise a fixture over `CASES` to run a test on all of them.

@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param
"""

from dataclasses import dataclass, field
from typing import Any

from random_plans import random_plan
from tiny_models import MODEL_NAMES, TOP_K, tiny_model
from transformers import PreTrainedModel

from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan

# Two groups of four, so that a group can lose experts and still have the two a grouped router needs.
_TWO_GROUPS = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": TOP_K}
EVICTED = ((1, 6), (3,))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One family or variant; what every per-family test is parametrised over."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)

    def model(self, **overrides: Any) -> PreTrainedModel:
        return tiny_model(self.name, **(self.overrides | overrides))

    def cut_model(self, *, packed: bool = False, **overrides: Any) -> PreTrainedModel:
        model = self.model(**overrides)
        apply_plan(model, plan=random_plan(model, evicted=EVICTED))
        if packed:
            quantize_model(model)
        return model


CASES = [Case(name=name, overrides=_TWO_GROUPS if name.endswith("_grouped") else {}) for name in MODEL_NAMES]
