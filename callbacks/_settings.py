"""Checks of constructor arguments that several callbacks share."""

from collections.abc import Mapping


def one_given(given: Mapping[str, object]) -> None:
    """Refuses none or several of settings that exclude each other.

    Raises:
        ValueError: with the names and values.
    """
    if sum(value is not None for value in given.values()) != 1:
        *names, last = (f"`{name}`" for name in given)
        raise ValueError(
            f"Give exactly one of {', '.join(names)} and {last}, got {dict(given)}. One that a config file sets is "
            "taken back by `null`."
        )
