"""Statistics of random text and of random sums: parts add up to the whole, experts may be numbered otherwise."""

# B sequences, S tokens of one, E experts, C channels of a layer

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_models import ModelCase, model_cases
from property_strategies import cases, generator_of, model_shapes, plans, seeds, statistics
from torch import Tensor

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.routers import row_tensor, set_row_tensor
from lightning_moe.records import STATISTICS, CalibrationStatistics, PrunePlan
from lightning_moe.records.statistics import WEIGHT_NORMS

pytestmark = pytest.mark.property

PLAIN = ("qwen3_moe", "olmoe", "deepseek_v3")


def whole_numbers(made: CalibrationStatistics) -> CalibrationStatistics:
    """The same with sums that are exact in any order."""
    corpora = {
        corpus: tuple({name: (8 * value).round() for name, value in layer.items()} for layer in layers)
        for corpus, layers in made.corpora.items()
    }
    return CalibrationStatistics(shape=made.shape, corpora=corpora, weights=made.weights)


def numbers(made: CalibrationStatistics) -> dict[tuple, list]:
    return {
        (corpus, index, name): value.tolist()
        for corpus, layers in made.corpora.items()
        for index, layer in enumerate(layers)
        for name, value in layer.items()
    }


@st.composite
def same_model(draw: st.DrawFn) -> list[CalibrationStatistics]:
    """Three calibrations of one model, each of one corpus or two; older ones without sums of absolute weights."""
    shape = draw(model_shapes(max_layers=2))
    drawn = [whole_numbers(draw(statistics(shapes=st.just(shape)))) for _ in range(3)]
    full = drawn[0].weights
    norms_only = tuple({name: norms[name] for name in WEIGHT_NORMS} for norms in full)
    return [
        CalibrationStatistics(shape=shape, corpora=one.corpora, weights=draw(st.sampled_from((full, norms_only))))
        for one in drawn
    ]


@given(three=same_model())
@cases(30)
def test_merging_is_adding_in_any_order(three):
    first, second, third = three
    left, right = first.merge(second).merge(third), third.merge(second.merge(first))
    assert left.digest == right.digest
    expected = {}
    for (_, index, name), value in ((key, value) for one in three for key, value in numbers(one).items()):
        had = expected.get((index, name))
        mine = torch.tensor(value, dtype=torch.float64)
        added = mine if had is None else torch.maximum(had, mine) if name.startswith("max_") else had + mine
        expected[index, name] = added
    for index, sums in enumerate(left.total()):
        assert all(torch.equal(sums[name], expected[index, name]) for name in sums)
    assert set(left.corpora) == set(first.corpora) | set(second.corpora) | set(third.corpora)
    assert all(set(norms) == set.intersection(*(set(one.weights[0]) for one in three)) for norms in left.weights)


@given(made=statistics(shapes=model_shapes(max_layers=2)), plan=plans())
@cases(20)
def test_records_come_back_from_their_files(made, plan):
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder, "statistics.safetensors"))
        plan.save(Path(folder, "plan.json"))
        again = CalibrationStatistics.load(Path(folder, "statistics.safetensors"))
        assert (again.digest, again.shape, numbers(again)) == (made.digest, made.shape, numbers(made))
        told = PrunePlan.load(Path(folder, "plan.json"))
    assert (told.digest, told.shape) == (plan.digest, plan.shape)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(told.keep, plan.keep, strict=True))


def random_batches(*, seed: int, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Sequences of random lengths, padded behind; each has at least one token."""
    generator, batches = generator_of(seed), []
    for num_sequences, length in sizes:
        ids_BS = torch.randint(3, 128, (num_sequences, length), generator=generator)
        length_B1 = torch.randint(1, length + 1, (num_sequences, 1), generator=generator)
        batches.append({"input_ids": ids_BS, "attention_mask": (torch.arange(length) < length_B1).long()})
    return batches


def collected(case: ModelCase, batches: list, *, name: str = "text") -> CalibrationStatistics:
    return collect_statistics(case.model(), loaders={name: batches}, progress=False)


def assert_near(mine: Tensor, expected: Tensor, *, what: str) -> None:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * largest, msg=lambda text: f"{what}: {text}")


@given(
    case=model_cases(),
    seed=seeds,
    sizes=st.lists(st.tuples(st.integers(1, 3), st.sampled_from((1, 2, 7))), min_size=2, max_size=4),
    data=st.data(),
)
@cases(12)
def test_statistics_of_the_parts_add_up_to_those_of_the_text(case, seed, sizes, data):
    """One-token sequences and experts without tokens included; no token counts twice and no padding at all."""
    batches = random_batches(seed=seed, sizes=sizes)
    place = data.draw(st.integers(1, len(batches) - 1))
    whole = collected(case, batches)
    parts = collected(case, batches[:place]).merge(collected(case, batches[place:]))
    num_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for layer, mine, theirs in zip(whole.shape.layers, parts.total(), whole.total(), strict=True):
        assert float(mine["num_tokens"]) == num_tokens
        assert float(mine["count"].sum()) == num_tokens * layer.top_k
        for name in theirs:
            assert_near(mine[name], theirs[name], what=name)


@given(case=model_cases(names=PLAIN, dtypes=(torch.float64,)), seed=seeds)
@cases(12)
def test_experts_in_another_order_have_the_same_statistics(case, seed):
    batches = random_batches(seed=seed, sizes=[(2, 9), (1, 5)])
    turned, orders = case.model(), []
    for layer in moe_layers(turned):
        width = layer.experts.down_proj.shape[2]
        order_E = torch.randperm(len(layer.experts.down_proj), generator=generator_of(seed + layer.index))
        for name in ("gate_up_proj", "down_proj"):
            parameter = layer.experts.get_parameter(name)
            parameter.data = parameter.data[order_E]
        for name, dim in layer.family.router_rows.items():
            set_row_tensor(layer.router, name, row_tensor(layer.router, name).detach().index_select(dim, order_E))
        channels_C = (order_E[:, None] * width + torch.arange(width)).flatten()
        orders.append({"E": order_E, "C": channels_C})
    mine = collect_statistics(turned, loaders={"text": batches}, progress=False).total()
    for sums, expected, order in zip(mine, collected(case, batches).total(), orders, strict=True):
        assert torch.equal(sums["count"], expected["count"][order["E"]])  # fp64: no two experts are nearly equal
        for name, value in expected.items():
            for dim, letter in enumerate(STATISTICS[name].dims):
                value = value.index_select(dim, order[letter]) if letter in order else value
            assert_near(sums[name], value, what=name)
