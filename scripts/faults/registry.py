"""All cases of the campaign, and what this machine cannot do."""

import importlib

from faults.cases import Case
from faults.space import can_forbid, how_a_disk_is_full

_MODULES = ("kills", "damage", "space", "memory", "data", "numbers")


def all_cases() -> list[Case]:
    """The `CASES` of every module.

    Raises:
        ValueError: two cases have one title.
    """
    cases = [case for name in _MODULES for case in importlib.import_module(f"faults.{name}").CASES]
    titles = [case.title for case in cases]
    twice = {title for title in titles if titles.count(title) > 1}
    if twice:
        raise ValueError(f"Two cases are called '{min(twice)}'.")
    return cases


def left_out() -> dict[str, str]:
    """Fault -> why it cannot be tried on this machine."""
    how_a_disk_is_full()  # found out once, before the workers are forked
    return {} if can_forbid() else {"read-only folder": "permissions do not hold for this user"}
