"""Plans that say two things, or that would write to a terminal what nobody sees."""

import pytest
from statistics_factory import make_plan, make_shape

from lightning_moe.files import read_json
from lightning_moe.records import PrunePlan


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"align": 16, "method": "reap", "align": 8}', "'align'"),
        ('[{"shape": {"layers": [{"name": "a", "widths": [8], "name": "b"}]}}]', "'name'"),
        ('{"' + "k" * 200 + '": 1, "' + "k" * 200 + '": 1}', "'" + "k" * 79),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, key):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=f"plan.json' is not a readable prune plan: {key} stands in it twice. Write"):
        read_json(tmp_path / "plan.json", what="prune plan")


def test_a_layer_that_stands_twice_in_a_plan_is_refused(tmp_path):
    plan = make_plan(make_shape())
    plan.save(tmp_path / "plan.json")
    name, text = plan.shape.layers[0].name, (tmp_path / "plan.json").read_text()
    assert text.count(f'"{name}": [') == 1
    (tmp_path / "plan.json").write_text(text.replace(f'"{name}": [', f'"{name}": ["00"], "{name}": ['))
    with pytest.raises(ValueError, match=f"'{name}' stands in it twice"):
        PrunePlan.load(tmp_path / "plan.json")


def test_many_keys_are_read_in_a_moment(tmp_path):
    """Counted once, not once for each key: 300,000 keys would take hours."""
    keys = [*range(300_000), 299_999]
    (tmp_path / "plan.json").write_text("{" + ", ".join(f'"{key}": 0' for key in keys) + "}")
    with pytest.raises(ValueError, match="'299999' stands in it twice"):
        read_json(tmp_path / "plan.json", what="prune plan")


@pytest.mark.parametrize("method", ["\x1b[2Jreap", "reap\nAll layers stay.", "\u202epaer", "\ud800"])
def test_a_method_that_cannot_be_printed_is_refused(method):
    plan = make_plan(make_shape())
    content = plan.to_dict() | {"method": method}
    with pytest.raises(
        ValueError, match=r"'a.json' is not a valid prune plan: `method` must be printable text, got '[a-z]*\\"
    ):
        PrunePlan.from_dict(content, source="a.json")
