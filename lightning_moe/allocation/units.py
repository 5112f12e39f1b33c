"""Sizes as people write them: 11.5GB, 800 MiB, 3.2M parameters."""

import re

_BYTES = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_LARGEST = 2.0**63
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes from text: `11.5GB` (KB, MB, GB, TB are powers of 1000), `10.7GiB` (KiB, ... of 1024), `900000` (bytes).

    Raises:
        ValueError: anything else, and a number below 1000 without a unit, which rarely means bytes.

    Examples:
        >>> parse_bytes("11.5GB"), parse_bytes("1 KiB")
        (11500000000, 1024)
    """
    size = _parse(text, units=_BYTES, what="a size in bytes", example="11.5GB (powers of 1000), 10.7GiB (of 1024)")
    if size < 1000 and not str(text).strip()[-1].isalpha():
        raise ValueError(f"{text!r} would be {size} bytes. Give its unit: {text}GB, say, or {text}B.")
    return size


def parse_params(text: str | int) -> int:
    """A number of parameters from text: `3.2M`, `16B` (thousand million), `5570560`.

    Raises:
        ValueError: anything else.
    """
    return _parse(text, units=_COUNTS, what="a number of parameters", example="3.2M, 16B or 5570560")


def _parse(text: str | int, *, units: dict[str, int], what: str, example: str) -> int:
    found = _NUMBER.fullmatch(str(text)) if isinstance(text, str) or abs(text) < _LARGEST else None
    known = {name.lower(): factor for name, factor in units.items()}
    if isinstance(text, bool) or found is None or found[2].lower() not in known:
        came = repr(text) if isinstance(text, str) or abs(text) < _LARGEST else f"a number of {text.bit_length()} bits"
        raise ValueError(f"{came[:80]} is not {what}. Write it like {example}; the units are {list(units)[1:]}.")
    size = float(found[1]) * known[found[2].lower()]
    if size >= _LARGEST:
        raise ValueError(f"{str(text)[:40]!r} is more than {what} can be. Write it like {example}.")
    return round(size)


def format_bytes(num_bytes: float) -> str:
    """In the largest power of 1000 that leaves a whole digit, with enough digits to tell neighbours apart."""
    return _format(num_bytes, units=["B", "KB", "MB", "GB", "TB"], gap=" ")


def format_params(count: float) -> str:
    """The same for parameters: K, M, B.

    Examples:
        >>> format_params(3_190_528)
        '3.191M'
    """
    return _format(count, units=["", "K", "M", "B", "T"], gap="")


def _format(value: float, *, units: list[str], gap: str) -> str:
    power = 0
    while abs(value) >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.4g}{gap}{units[power]}" if power == 0 else f"{value:.3f}{gap}{units[power]}"
