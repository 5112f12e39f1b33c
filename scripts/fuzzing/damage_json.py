"""Damage to the structure of JSON: values, keys and nesting, and what only its text can say."""

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from fuzzing.damage_bytes import BYTES, Damage, Draw
from hypothesis import strategies as st

Path = tuple[str | int, ...]

_NUMBERS = (-1, 0, 1, 2, 3, 7, 64, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**12, 10**40, -(10**12))
_FLOATS = (0.5, -0.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    "",
    "0",
    "None",
    "../outside",
    "../../outside",
    "/etc/passwd",
    "a/../../b",
    "..\\..\\outside",
    "nul\x00byte",
    "\ud800",
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "a\nb: c",
    "x" * 5000,
    "__class__",
    "evil.Evil",
)
_CODE = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
_OUTSIDE = tuple(text for text in _TEXTS if "outside" in text)
SCALARS = st.one_of(
    st.sampled_from(_NUMBERS),
    st.sampled_from(_FLOATS),
    st.sampled_from(_TEXTS),
    st.sampled_from((None, True, False)),
    st.integers(),
    st.text(max_size=8),
)
VALUES = st.one_of(
    SCALARS,
    st.builds(list),
    st.builds(dict),
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.text(max_size=4), SCALARS),
)


def damage_tree(tree: Any, draw: Draw) -> Any:
    """A copy of plain types in which one to three places are changed."""
    holder = [deepcopy(tree)]
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        paths = list(_paths(holder))
        if not paths:  # the whole tree was dropped
            return None
        path = draw(st.sampled_from(paths))
        _change(_at(holder, path[:-1]), path[-1], draw)
    return holder[0] if holder else None


def _paths(node: Any, before: Path = ()) -> Iterator[Path]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from _paths(value, (*before, key))


def _at(node: Any, path: Path) -> Any:
    for key in path:
        node = node[key]
    return node


def _change(parent: Any, key: Any, draw: Draw) -> None:
    value = parent[key]
    match draw(
        st.sampled_from(("replace", "lead out", "nudge", "retype", "drop", "double", "rename", "wrap", "swap", "add"))
    ):
        case "replace":
            parent[key] = draw(VALUES)
        case "lead out" if isinstance(value, str):
            parent[key] = draw(st.sampled_from(_OUTSIDE))
        case "nudge":
            parent[key] = _nudged(value, draw)
        case "retype":
            parent[key] = draw(st.sampled_from((str(value), [value], {"0": value}, value is None, None)))
        case "drop":
            del parent[key]
        case "double" if isinstance(value, list):
            value.extend(deepcopy(value) * draw(st.sampled_from((1, 1, 50))))
        case "rename" if isinstance(parent, dict):
            parent[draw(st.one_of(st.sampled_from(_TEXTS), st.sampled_from([*parent, key])))] = parent.pop(key)
        case "wrap":
            parent[key] = _nested(value, depth=draw(st.sampled_from((1, 20, 200))))
        case "swap":
            _swap(parent, key, draw)
        case _:
            _add(parent, draw)


def _nudged(value: Any, draw: Draw) -> Any:
    """A number near it, or a text with something inside."""
    if isinstance(value, int | float):
        return value + draw(st.sampled_from((-1, 1, -0.5, 2**32, -value, value, -2 * value)))
    if isinstance(value, str):
        at = draw(st.integers(0, len(value)))
        return value[:at] + draw(st.sampled_from(_TEXTS)) + value[at:]
    return draw(SCALARS)


def _nested(value: Any, *, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def _swap(parent: Any, key: Any, draw: Draw) -> None:
    keys = list(parent) if isinstance(parent, dict) else range(len(parent))
    other = draw(st.sampled_from(list(keys)))
    parent[key], parent[other] = parent[other], parent[key]


def _add(parent: Any, draw: Draw) -> None:
    value = draw(VALUES)
    if isinstance(parent, list):
        parent.append(value)
        return
    key = draw(st.sampled_from((*_TEXTS, "auto_map", "__reduce__", "quantization_config", "version", "kind")))
    parent[key] = deepcopy(_CODE) if key == "auto_map" else value


def encode(tree: Any) -> bytes:
    """JSON with NaN, infinities and lone surrogates, as hostile writers would write it."""
    return json.dumps(tree).encode()


def change_values(content: bytes, draw: Draw) -> bytes:
    """Another value, key or nesting somewhere in the tree."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return draw(st.sampled_from(BYTES))(content, draw)
    return encode(damage_tree(tree, draw))


def change_lines(content: bytes, draw: Draw) -> bytes:
    """The same in one line of many, or lines twice, swapped, gone."""
    lines = content.splitlines() or [b""]
    at = draw(st.integers(0, len(lines) - 1))
    match draw(st.sampled_from(("change", "change", "double", "drop", "join"))):
        case "change":
            lines[at] = change_values(lines[at], draw)
        case "double":
            lines += [lines[at]] * draw(st.sampled_from((1, 100)))
        case "drop":
            del lines[at]
        case _:
            return b" ".join(lines)
    return b"\n".join(lines) + b"\n"


def change_text(content: bytes, draw: Draw) -> bytes:
    """What a tree cannot hold: keys twice, numbers of 5,000 digits, nesting of 100,000, other encodings."""
    text = content.decode("utf-8", errors="replace")
    numbers = [at for at, letter in enumerate(text) if letter in "0123456789" and text[at - 1 : at] in (" ", ":", "[")]
    at = draw(st.sampled_from(numbers)) if numbers else 0
    match draw(
        st.sampled_from(("digits", "exponent", "literal", "twice", "deep", "bom", "utf16", "comment", "surrogate"))
    ):
        case "digits":
            return (text[:at] + "9" * 5000 + text[at:]).encode()
        case "exponent":
            return (text[:at] + "1e999" + text[at + 1 :]).encode()
        case "literal":
            return (text[:at] + draw(st.sampled_from(("NaN", "Infinity", "-Infinity", "-"))) + text[at + 1 :]).encode()
        case "twice":
            return _key_twice(text, draw).encode()
        case "deep":
            bracket = draw(st.sampled_from(("[", '{"a":')))
            return (text[:at] + bracket * 100_000 + text[at:]).encode()
        case "bom":
            return b"\xef\xbb\xbf" + content
        case "utf16":
            return text.encode("utf-16")
        case "comment":
            return (text[:at] + "/* */" + text[at:]).encode()
        case _:
            return content.replace(b"e", b"\xed\xa0\x80", 1)


def _key_twice(text: str, draw: Draw) -> str:
    at = text.find("{")
    value = json.dumps(draw(SCALARS))
    keys = [part.split('"')[0] for part in text.split('"')[1::2]][:20] or ["a"]
    return f'{text[: at + 1]}"{draw(st.sampled_from(keys))}": {value}, {text[at + 1 :]}' if at >= 0 else text * 2


JSON: tuple[Damage, ...] = (change_values, change_values, change_values, change_text)
LINES: tuple[Damage, ...] = (change_lines, change_lines, change_text)
