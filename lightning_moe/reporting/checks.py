"""Checks of what a file of results says; every message names the place."""

import math
from collections.abc import Mapping
from typing import Any

# Beyond it a whole number of a file is none that was measured, and may have no float.
_LARGEST = 2**63
_LONGEST = 80


def check_mapping(value: object, *, where: str) -> Mapping[Any, Any]:
    """The value, if it is a mapping.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, got {type(value).__name__}.")
    return value


def check_rows(whole: Mapping[str, Any], *, key: str, where: str = "the summary") -> list[Any]:
    """The list under `key` of a summary or a record; an empty one where there is none.

    Raises:
        ValueError: it is something else.
    """
    rows = whole.get(key, [])
    if not isinstance(rows, list | tuple):
        raise ValueError(f"{str(key)!r} of {where} must be a list, got {type(rows).__name__}.")
    return list(rows)


def check_number(row: Mapping[Any, Any], *, key: Any, where: str) -> float:
    """The number under `key`, NaN and infinity included.

    Raises:
        ValueError: it is missing or something else.
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{str(key)!r} of {where} must be a number, got {shortened(value)}.")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"{str(key)!r} of {where} must be a number below 2**63, got one of {value.bit_length()} bits.")
    return value


def check_known(row: Mapping[Any, Any], *, key: Any, where: str) -> float | None:
    """A finite number >= 0, or nothing where the run did not measure it.

    Raises:
        ValueError: it is something else.

    Examples:
        >>> check_known({"bytes": 12}, key="bytes", where="row 'a'"), check_known({}, key="bytes", where="row 'a'")
        (12, None)
        >>> check_known({"bytes": -1}, key="bytes", where="row 'a'")
        Traceback (most recent call last):
        ValueError: 'bytes' of row 'a' must be finite and >= 0, got -1.
    """
    if row.get(key) is None:
        return None
    value = check_number(row, key=key, where=where)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{str(key)!r} of {where} must be finite and >= 0, got {value}.")
    return value


def check_share(row: Mapping[str, Any], *, key: str, where: str) -> float | None:
    """A share in [0, 1) that is gone, or nothing where the run did not measure it.

    Raises:
        ValueError: it is something else.
    """
    value = check_known(row, key=key, where=where)
    if value is not None and value >= 1:
        raise ValueError(f"{str(key)!r} of {where} must be in [0, 1), got {value}.")
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
        raise ValueError(f"{where} needs {str(key)!r}, a text, got {shortened(value)}.")
    return value


def shortened(value: object) -> str:
    """What came, for a message: not a whole file of it."""
    text = repr(value) if isinstance(value, str | float | bool | None) else type(value).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
