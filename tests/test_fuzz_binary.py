"""Damaged and hostile files with tensors at every reader, a few hundred of the long run's cases each."""

import pytest
from fuzzing.binary_readers import BINARY_READERS
from fuzzing.campaign import check_sample, judge, silenced
from fuzzing.mutations import DamagedSample, damaged
from fuzzing.readers import Reader
from hypothesis import HealthCheck, Phase, given, settings

pytestmark = pytest.mark.fuzz

# Those that load no model read a sample in a millisecond.
QUICK = {"tensors", "statistics", "hidden_states", "teacher_logits", "shards", "stored_tensors", "resumed", "sizes"}


@pytest.mark.parametrize("reader", BINARY_READERS, ids=lambda reader: reader.name)
def test_what_is_read_is_sound_and_all_else_is_refused(reader: Reader, tmp_path) -> None:
    seen = {"read": 0, "refused": 0}
    with silenced():
        sample = check_sample(reader, folder=tmp_path / "valid")

        @settings(
            max_examples=200 if reader.name in QUICK else 40,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(damaged(sample))
        def one(case: DamagedSample) -> None:
            outcome = judge(reader, case, folder=tmp_path / "damaged")
            assert outcome.kind in seen, (outcome.what, outcome.where, case.story)
            seen[outcome.kind] += 1

        one()
    assert seen["refused"] > 5 or reader.name == "shards"  # a damaged one is written again
