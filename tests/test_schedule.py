"""When scheduled cuts are due, and what is refused."""

import pytest

from lightning_moe.surgery.schedule import PruneSchedule

CUTS = ((2, 0.25), (5, 0.5))


@pytest.mark.parametrize(
    ("step", "num_done", "expected"),
    [(0, 0, None), (1, 0, None), (2, 0, (1, 0.25)), (3, 1, None), (5, 1, (2, 0.5)), (9, 2, None), (9, 0, (2, 0.5))],
)
def test_due_once_at_each_step_and_only_the_last_when_overdue(step, num_done, expected):
    assert PruneSchedule(cuts=CUTS).due(step=step, num_done=num_done) == expected


@pytest.mark.parametrize("cuts", [(), ((5, 0.25), (2, 0.5)), ((2, 0.5), (5, 0.25)), ((2, 0.25), (2, 0.5))])
def test_order_is_checked(cuts):
    with pytest.raises(ValueError, match="both strictly ascending, got"):
        PruneSchedule(cuts=cuts)


@pytest.mark.parametrize("cuts", [((-1, 0.25),), ((1, 0.0),), ((1, 1.0),)])
def test_range_is_checked(cuts):
    with pytest.raises(ValueError, match=r"steps >= 0 and prune ratios inside \(0, 1\)"):
        PruneSchedule(cuts=cuts)


def test_several_devices_are_refused_before_the_first_batch():
    PruneSchedule(cuts=CUTS).check_trainer(num_devices=1)
    with pytest.raises(ValueError, match=r"one device, got 2\. Use `prune_ratio`"):
        PruneSchedule(cuts=CUTS).check_trainer(num_devices=2)
