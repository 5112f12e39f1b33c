"""Fixtures that several files use."""

import pytest
from torch import Tensor

from lightning_moe.adapters import step as adapted_step


@pytest.fixture
def norms_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of experts of each computation of norms (three a run)."""
    calls: list[int] = []
    original = adapted_step.adapted_norm

    def counted(product_Gro: Tensor, *args: object) -> Tensor:
        calls.append(len(product_Gro))
        return original(product_Gro, *args)

    monkeypatch.setattr(adapted_step, "adapted_norm", counted)
    return calls
