"""Damage to safetensors files: their headers, the JSON inside their metadata, and numbers."""

import json
from math import prod
from typing import Any

from fuzzing.damage_bytes import BYTES, Damage, Draw
from fuzzing.damage_json import VALUES, damage_tree, encode
from hypothesis import strategies as st

_TYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F4",
    "U64",
    "C64",
    "F128",
    "",
    "f32",
)
_LENGTHS = (0, 1, 7, 2**20, 100_000_000, 100_000_001, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
_SIZES = (-1, 0, 1, 3, 2**20, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30)
# Of numbers that a file should not hold, by type.
_PATTERNS = (
    b"\xff" * 8,
    b"\x00\x00\x00\x00\x00\x00\xf8\x7f",
    b"\x00\x00\xc0\x7f" * 2,
    b"\xc0\x7f" * 4,
    b"\x00\x00\x80\x7f" * 2,
    b"\x00\x7c" * 4,
    b"\x00\x00\x00\x00\x00\x00\xf0\xbf",
    b"\x00" * 8,
)


def split(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Header and numbers; None if it is damaged already."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
    except (ValueError, RecursionError):
        return None
    return (header, content[8 + size :]) if isinstance(header, dict) else None


def join(header: Any, numbers: bytes) -> bytes:
    """The inverse of `split`."""
    encoded = encode(header)
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + numbers


def change_length(content: bytes, draw: Draw) -> bytes:
    """Another length of the header than it has."""
    own = int.from_bytes(content[:8], "little")
    near = st.sampled_from((own - 8, own - 1, own + 1, own + 8, len(content), len(content) - 8))
    length = draw(st.one_of(st.sampled_from(_LENGTHS), near, st.integers(0, 2**64 - 1)))
    return (length % 2**64).to_bytes(8, "little") + content[8:]


def change_header(content: bytes, draw: Draw) -> bytes:
    """Anything in the tree of the header."""
    parts = split(content)
    return content if parts is None else join(damage_tree(parts[0], draw), parts[1])


def change_entry(content: bytes, draw: Draw) -> bytes:
    """Type, shape, offsets or name of one tensor."""
    parts = split(content)
    names = [] if parts is None else [name for name in parts[0] if name != "__metadata__" and _is_whole(parts[0][name])]
    if parts is None or not names:
        return draw(st.sampled_from(BYTES))(content, draw)
    header, numbers = parts
    name = draw(st.sampled_from(names))
    entry, other = header[name], header[draw(st.sampled_from(names))]
    first, last = entry["data_offsets"]
    match draw(st.sampled_from(("type", "shape", "reshape", "offsets", "shift", "steal", "rename", "drop", "grow"))):
        case "type":
            entry["dtype"] = draw(st.sampled_from(_TYPES))
        case "shape":
            entry["shape"] = draw(st.lists(st.sampled_from(_SIZES), max_size=4))
        case "reshape":
            entry["shape"] = _same_product(entry["shape"], draw)
        case "offsets":
            entry["data_offsets"] = draw(st.lists(st.sampled_from((*_SIZES, first, last)), min_size=1, max_size=3))
        case "shift":
            step = draw(st.sampled_from((-8, -1, 1, 8, 2**32)))
            entry["data_offsets"] = [first + step, last + step]
        case "steal":
            entry["data_offsets"] = other["data_offsets"]
        case "rename":
            header[draw(st.sampled_from((*names, "", "x", "\x00", f"{name}.weight")))] = header.pop(name)
        case "drop":
            del header[name]
        case _:
            header, numbers = _grown(header, name, numbers, draw)
    return join(header, numbers)


def _is_whole(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() >= {"dtype", "shape", "data_offsets"}
        and all(
            isinstance(entry[key], list) and all(type(n) is int for n in entry[key])
            for key in ("shape", "data_offsets")
        )
        and len(entry["data_offsets"]) == 2
    )


def _same_product(shape: list[int], draw: Draw) -> list[int]:
    size = prod(shape)
    options = [[size], [1, size], [size, 1], list(reversed(shape)), [*shape, 1], [0, *shape], [2, size // 2]]
    return draw(st.sampled_from(options))


def _grown(header: dict[str, Any], name: str, numbers: bytes, draw: Draw) -> tuple[dict[str, Any], bytes]:
    """One more row or one row less of a tensor, all else consistent: only its meaning is wrong."""
    entry = header[name]
    first, last = entry["data_offsets"]
    shape = entry["shape"] or [1]
    row = (last - first) // max(1, shape[0])
    if draw(st.booleans()):
        changed, step = numbers[:last] + numbers[last - row : last] + numbers[last:], row
    else:
        changed, step = numbers[: last - row] + numbers[last:], -row
    entry["shape"] = [shape[0] + (1 if step > 0 else -1), *shape[1:]]
    for one in header.values():
        if _is_whole(one) and one is not entry and one["data_offsets"][0] >= last:
            one["data_offsets"] = [offset + step for offset in one["data_offsets"]]
    entry["data_offsets"] = [first, last + step]
    return header, changed


def change_metadata(content: bytes, draw: Draw) -> bytes:
    """The JSON that stands as text inside the metadata."""
    parts = split(content)
    metadata = None if parts is None else parts[0].get("__metadata__")
    if parts is None or not metadata or not isinstance(metadata, dict):  # damaged before
        return change_header(content, draw)
    header, numbers = parts
    key = draw(st.sampled_from([*metadata]))
    try:
        tree = json.loads(metadata[key])
    except (ValueError, TypeError, RecursionError):
        metadata[key] = draw(VALUES)
        return join(header, numbers)
    damaged = json.dumps(damage_tree(tree, draw))
    deep = draw(st.sampled_from((False,) * 7 + (True,)))
    metadata[key] = "[" * 100_000 if deep else damaged
    return join(header, numbers)


def change_numbers(content: bytes, draw: Draw) -> bytes:
    """NaN, infinity, -1, the largest: at the beginning of some tensor."""
    parts = split(content)
    if parts is None:
        return draw(st.sampled_from(BYTES))(content, draw)
    header, numbers = parts
    starts = [entry["data_offsets"][0] for entry in header.values() if _is_whole(entry)] or [0]
    at = max(0, draw(st.sampled_from(starts)))
    pattern = draw(st.one_of(st.sampled_from(_PATTERNS), st.binary(min_size=1, max_size=8)))
    return join(header, numbers[:at] + pattern + numbers[at + len(pattern) :])


TENSORS: tuple[Damage, ...] = (
    change_length,
    change_header,
    change_entry,
    change_entry,
    change_metadata,
    change_metadata,
    change_numbers,
)
