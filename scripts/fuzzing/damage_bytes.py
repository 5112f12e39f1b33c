"""Damage that any file can take: bits, bytes and pieces of it."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
Damage = Callable[[bytes, Draw], bytes]

_RUNS = (b"\x00" * 8, b"\xff" * 8, b"\xff\xfe", b"\xc3\x28", b"\r\n", b"\x00", b"{", b"[" * 40, b'"', b"PK\x03\x04")


def place(content: bytes, draw: Draw) -> int:
    """Some position, the first bytes (headers, magic numbers) as likely as all others."""
    last = max(0, len(content) - 1)
    return draw(st.one_of(st.integers(0, min(last, 16)), st.integers(0, last)))


def flip_bits(content: bytes, draw: Draw) -> bytes:
    """One to eight single bits."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        if damaged:
            damaged[place(content, draw)] ^= 1 << draw(st.integers(0, 7))
    return bytes(damaged)


def truncate(content: bytes, draw: Draw) -> bytes:
    """The first part only."""
    return content[: place(content, draw)]


def insert(content: bytes, draw: Draw) -> bytes:
    """Some bytes that were not there."""
    at, extra = place(content, draw), draw(st.one_of(st.sampled_from(_RUNS), st.binary(min_size=1, max_size=24)))
    return content[:at] + extra + content[at:]


def overwrite(content: bytes, draw: Draw) -> bytes:
    """Some bytes replaced by others."""
    at, extra = place(content, draw), draw(st.one_of(st.sampled_from(_RUNS), st.binary(min_size=1, max_size=24)))
    return content[:at] + extra + content[at + len(extra) :]


def cut_out(content: bytes, draw: Draw) -> bytes:
    """Without a piece of it."""
    first, last = sorted((place(content, draw), place(content, draw)))
    return content[:first] + content[last:]


def repeat(content: bytes, draw: Draw) -> bytes:
    """A piece of it twice."""
    first, last = sorted((place(content, draw), place(content, draw)))
    return content[:last] + content[first:]


def replace_all(content: bytes, draw: Draw) -> bytes:
    """Something else altogether."""
    return draw(st.one_of(st.just(b""), st.binary(max_size=64), st.sampled_from((b"null", b"[]", b"{}", b"0", b'""'))))


BYTES: tuple[Damage, ...] = (flip_bits, truncate, insert, overwrite, cut_out, repeat, replace_all)
