"""Corners of the records of a calibration: infinities of either sign, parts of which only some have optional sums."""

from dataclasses import replace

import pytest
import torch
from statistics_factory import make_statistics

from lightning_moe.records.statistics import REQUIRED, check_numbers


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_no_infinity_passes_among_finite_numbers(number, signed):
    value_C = torch.tensor([1.0, number, 2.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="layer 3: statistic count holds NaN or infinity"):
        check_numbers(value_C, size=(3,), signed=signed, what="layer 3: statistic count")


@pytest.mark.parametrize("turned", [False, True])
def test_a_merged_corpus_has_the_sums_that_both_parts_have(turned):
    full = make_statistics(optional=True)
    plain = replace(make_statistics(seed=1), weights=full.weights)
    first, second = (plain, full) if turned else (full, plain)
    parts = zip(full.corpora["text"], plain.corpora["text"], strict=True)
    for (mine, theirs), sums in zip(parts, first.merge(second).total(), strict=True):
        assert set(sums) == REQUIRED
        assert torch.equal(sums["count"], mine["count"] + theirs["count"])
        assert torch.equal(sums["max_abs"], torch.maximum(mine["max_abs"], theirs["max_abs"]))


@pytest.mark.parametrize(("factor", "same"), [(1 + 1e-7, True), (1 + 1e-5, False), (1 - 1e-5, False)])
def test_weights_may_differ_by_the_rounding_of_their_sums_and_no_more(factor, same):
    made = make_statistics()
    other = replace(made, weights=tuple({name: value * factor for name, value in own.items()} for own in made.weights))
    if same:
        assert torch.equal(made.merge(other).total()[0]["count"], 2 * made.total()[0]["count"])
    else:
        with pytest.raises(ValueError, match=r"experts: gate_sq_norm differs, so the weights do"):
            made.merge(other)
