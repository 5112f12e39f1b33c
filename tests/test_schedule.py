"""When scheduled cuts are due: lists and curves, computed by hand; and what is refused."""

import pytest

from lightning_moe.surgery.schedule import GradualSchedule, PruneSchedule, build_schedule

pytestmark = pytest.mark.schedule
CUTS = ((2, 0.25), (5, 0.5))
CURVE = {"shape": "cubic", "begin": 100, "end": 1000, "num_cuts": 5, "prune_ratio": 0.5}


@pytest.mark.parametrize(
    ("step", "num_done", "expected"),
    [(0, 0, None), (1, 0, None), (2, 0, (1, 0.25)), (3, 1, None), (5, 1, (2, 0.5)), (9, 2, None), (9, 0, (2, 0.5))],
)
def test_due_once_at_each_step_and_only_the_last_when_overdue(step, num_done, expected):
    assert PruneSchedule(cuts=CUTS).due(step=step, num_done=num_done) == expected


def test_a_cubic_curve_by_hand():
    """Steps 100 + k 900 / 5; x = 0.2, 0.4, ...: 1 - 0.8^3 = 0.488, 1 - 0.6^3 = 0.784, 0.936, 0.992, 1, each halved."""
    cuts = GradualSchedule(**CURVE).to_cuts().cuts
    assert [step for step, _ in cuts] == [280, 460, 640, 820, 1000]
    assert [ratio for _, ratio in cuts] == pytest.approx([0.244, 0.392, 0.468, 0.496, 0.5])
    assert cuts[-1] == (1000, 0.5)


def test_a_linear_curve_by_hand():
    """Steps 10 + k 10 / 3, rounded: 13, 17, 20; the ratio at 13 is 0.6 * 3 / 10, at 17 0.6 * 7 / 10."""
    cuts = GradualSchedule(shape="linear", begin=10, end=20, num_cuts=3, prune_ratio=0.6).to_cuts().cuts
    assert [step for step, _ in cuts] == [13, 17, 20]
    assert [ratio for _, ratio in cuts] == pytest.approx([0.18, 0.42, 0.6])
    assert cuts[-1] == (20, 0.6)


def test_one_cut_is_the_end_of_the_curve():
    assert GradualSchedule(**CURVE | {"num_cuts": 1}).to_cuts().cuts == ((1000, 0.5),)


def test_a_cut_in_every_step():
    cuts = GradualSchedule(shape="linear", begin=0, end=4, num_cuts=4, prune_ratio=0.5).to_cuts().cuts
    assert cuts == ((1, 0.125), (2, 0.25), (3, 0.375), (4, 0.5))


@pytest.mark.parametrize("given", [[[2, 0.25], [5, 0.5]], CUTS, PruneSchedule(cuts=CUTS)])
def test_a_schedule_is_built_from_pairs_or_is_one(given):
    assert build_schedule(given) == PruneSchedule(cuts=CUTS)
    assert build_schedule(given).prune_ratio == 0.5


def test_a_schedule_is_built_from_a_curve():
    assert build_schedule(GradualSchedule(**CURVE)).cuts[-1] == (1000, 0.5)


@pytest.mark.parametrize("cuts", [(), ((5, 0.25), (2, 0.5)), ((2, 0.5), (5, 0.25)), ((2, 0.25), (2, 0.5))])
def test_order_is_checked(cuts):
    with pytest.raises(ValueError, match="both strictly ascending, got"):
        PruneSchedule(cuts=cuts)


@pytest.mark.parametrize("cuts", [((-1, 0.25),), ((1, 0.0),), ((1, 1.0),), ((1, float("nan")),), ((1, float("inf")),)])
def test_range_is_checked(cuts):
    with pytest.raises(ValueError, match=r"steps >= 0 and prune ratios inside \(0, 1\)"):
        PruneSchedule(cuts=cuts)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": "sine"}, r"`shape` of a schedule must be one of \('linear', 'cubic'\), got 'sine'"),
        ({"begin": -1}, "`begin` must be a whole number >= 0, got -1"),
        ({"num_cuts": 0}, "`num_cuts` must be a whole number >= 1, got 0"),
        ({"end": 104}, "`end` must be a whole number >= 105, got 104"),
        ({"prune_ratio": 1.0}, r"`prune_ratio` of a schedule must be inside \(0, 1\), got 1.0"),
        ({"prune_ratio": True}, r"`prune_ratio` of a schedule must be inside \(0, 1\), got True"),
    ],
)
def test_a_curve_is_checked(change, match):
    with pytest.raises(ValueError, match=match):
        GradualSchedule(**CURVE | change)


NO_CUTS = [[5], [1, 0.5, 2], [1.7, 0.2], [True, 0.2], ["1", 0.2], [1, True], [1, None], [1, "0.2"], "ab", 5]


@pytest.mark.parametrize("given", [[5, 0.5], 5, None, "ab", {1: 0.2}, {10: 0.2, 20: 0.4}, *([cut] for cut in NO_CUTS)])
def test_what_is_no_list_of_cuts_is_refused(given):
    match = r"`schedule` must be \[step, prune_ratio\] pairs, got .*: a whole number and a number each"
    with pytest.raises(ValueError, match=match):
        build_schedule(given)
    with pytest.raises(ValueError, match=match):
        PruneSchedule(cuts=given)
