"""Damaged text at every reader: read, or refused in one line that names file or field; the long form is a script."""

import pytest
from fuzzing.campaign import check_sample, run_batch, silenced
from fuzzing.text_readers import TEXT_READERS

pytestmark = pytest.mark.fuzz

# A page takes a tenth of a second, its parts and the library of corpora a few hundredths.
_FEW = {"report": 8, "sizes_from_config": 20, "comparison": 25, "matrix": 25, "run_config": 25}
_SOME, _MANY = 15, 60


def cases_of(reader):
    return _FEW.get(reader.name, _SOME if reader.name.startswith("corpus") else _MANY)


@pytest.mark.parametrize("reader", TEXT_READERS, ids=lambda reader: reader.name)
def test_no_damage_gets_past(reader, tmp_path):
    with silenced():
        sample = check_sample(reader, folder=tmp_path / "sample")
        tally = run_batch(reader, sample, batch=0, cases=cases_of(reader))
    assert tally.findings == []
    assert tally.cases == cases_of(reader)
    assert tally.refused > 0
