"""Checks of what a file of results says; every message names the place."""

import math
from collections.abc import Mapping
from typing import Any


def check_mapping(value: object, *, where: str) -> Mapping[str, Any]:
    """The value, if it is a mapping.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, got {type(value).__name__}.")
    return value


def check_rows(whole: Mapping[str, Any], *, key: str) -> list[Any]:
    """The list under `key` of a summary; an empty one where there is none.

    Raises:
        ValueError: it is something else.
    """
    rows = whole.get(key, [])
    if not isinstance(rows, list | tuple):
        raise ValueError(f"'{key}' of the summary must be a list, got {type(rows).__name__}.")
    return list(rows)


def check_number(row: Mapping[str, Any], *, key: str, where: str) -> float:
    """The number under `key`, NaN and infinity included.

    Raises:
        ValueError: it is missing or something else.
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"'{key}' of {where} must be a number, got {value!r}.")
    return value


def check_known(row: Mapping[str, Any], *, key: str, where: str) -> float | None:
    """A finite number >= 0, or nothing where the run did not measure it.

    Raises:
        ValueError: it is something else.
    """
    if row.get(key) is None:
        return None
    value = check_number(row, key=key, where=where)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"'{key}' of {where} must be finite and >= 0, got {value}.")
    return value


def check_count(row: Mapping[str, Any], *, key: str, where: str) -> int | None:
    """See `check_known`, rounded to a whole number."""
    value = check_known(row, key=key, where=where)
    return None if value is None else round(value)


def check_text(row: Mapping[str, Any], *, key: str, where: str) -> str:
    """The text under `key`, not empty.

    Raises:
        ValueError: it is missing or something else.
    """
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} needs '{key}', a text, got {value!r}.")
    return value
