"""YAML of configs, looked at before values are made of it: what is nested or repeated without bound is refused."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, get_loader, set_loader
from yaml import MappingNode, Node, SafeLoader, ScalarNode, SequenceNode, YAMLError, compose

# Configs are a few levels deep, and a few hundred values long.
_DEEPEST = 50
_MOST_VALUES = 100_000
_INTEGER, _MOST_DIGITS = "tag:yaml.org,2002:int", 100
# A value on the command line: too short to be more than a few levels deep.
_SHORT = 80
# Where configs of the thin commands have records, lists and mappings of records; and what a class's path looks like.
_RECORDS, _LISTS = ("grid", "matrix", "recovery", "adapter"), ("stages",)
_MAPPINGS = ("train", "validation", "calibration")
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@contextmanager
def checked_configs(*, classes: bool) -> Iterator[None]:
    """Inside the block jsonargparse reads no YAML that `check_yaml` refuses.

    Args:
        classes: whether a config may name classes to be imported and made, as those of `fit` do.
    """
    plain: Any = get_loader("yaml")
    set_loader("yaml", partial(_checked, load=plain, classes=classes), exceptions=(YAMLError,))
    try:
        yield
    finally:
        set_loader("yaml", plain, exceptions=(YAMLError,))


def check_config_files(arguments: Sequence[str], *, classes: bool) -> None:
    """Refuses files given as `--config` that `check_yaml` refuses, by their names.

    Args:
        arguments: of a command.
        classes: see `checked_configs`.

    Raises:
        ArgumentError: with the file and the line.
    """
    given = [value for flag, value in pairwise(arguments) if flag == "--config"]
    given += [own.removeprefix("--config=") for own in arguments if own.startswith("--config=")]
    for file in given:
        try:
            if Path(file).is_file():
                root = check_yaml(Path(file).read_text(encoding="utf-8"), classes=classes)
                if not isinstance(root, MappingNode):
                    raise YAMLError("it is empty" if root is None else "it is no mapping of settings")
                if [node.value for _, node in root.value] == [""]:
                    raise YAMLError("its only key has no value")
        except (YAMLError, UnicodeDecodeError) as error:
            told = " ".join(str(error).split())
            raise ArgumentError(None, f"The config '{file}' cannot be read: {told}.") from error


def _checked(stream: str, *, load: Any, classes: bool) -> Any:
    if len(stream) > _SHORT or "&" in stream or ":" in stream:
        check_yaml(stream, classes=classes)
    try:
        return load(stream)
    except YAMLError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits
        raise YAMLError(str(error)) from error


def check_yaml(text: str, *, classes: bool = False) -> Node | None:
    """Refuses YAML that is nested too deeply, that its aliases make too large, or in which a key stands twice.

    Args:
        text: of a config, or of a value in one.
        classes: whether it may name classes to be imported and made.

    Returns:
        Its nodes; None of an empty text.

    Raises:
        YAMLError: with the line.
    """
    try:
        root = compose(text, Loader=SafeLoader)
    except RecursionError as error:
        raise YAMLError(f"it is nested more than {_DEEPEST} levels deep") from error
    if root is not None:
        _count(root, depth=0, known={})
        if not classes:
            _check_no_class(root)
    return root


def _count(node: Node, *, depth: int, known: dict[int, int]) -> int:
    """Values of a node, those of an alias as often as it is used; 0 stands for a node that is being counted."""
    line = node.start_mark.line + 1
    if depth > _DEEPEST:
        raise YAMLError(f"line {line} is nested more than {_DEEPEST} levels deep")
    if isinstance(node, ScalarNode) and node.tag == _INTEGER and len(node.value) > _MOST_DIGITS:
        raise YAMLError(f"line {line} has a number of more than {_MOST_DIGITS} digits")
    if known.get(id(node)) == 0:
        raise YAMLError(f"line {line} contains itself by an alias")
    if id(node) not in known:
        known[id(node)] = 0
        known[id(node)] = 1 + sum(_count(child, depth=depth + 1, known=known) for child in _children(node))
    if known[id(node)] > _MOST_VALUES:
        raise YAMLError(f"line {line} has more than {_MOST_VALUES} values, by aliases that repeat one another")
    return known[id(node)]


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, SequenceNode):
        yield from node.value
    elif isinstance(node, MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, ScalarNode) and key.value in seen:
                raise YAMLError(f"line {key.start_mark.line + 1}: the key `{key.value}` stands twice")
            seen.add(str(key.value))
            yield from (key, value)


def _check_no_class(root: Node) -> None:
    """Refuses what the parser would import: `class_path`, and the path of a class where a record's fields belong."""
    for holder in _nodes(root):
        for key, value in holder.value if isinstance(holder, MappingNode) else ():
            name, line = str(key.value), key.start_mark.line + 1
            if name == "class_path":
                raise YAMLError(f"line {line}: `class_path` cannot be had here: only `fit` and `validate` make classes")
            for own in _of_records(name, value):
                # The name of a file of fields looks like a class's path, too.
                if isinstance(own, ScalarNode) and _CLASS.fullmatch(own.value) and not Path(own.value).is_file():
                    raise YAMLError(f"line {line}: `{name}` takes fields as a mapping, got '{own.value}'")


def _of_records(name: str, value: Node) -> list[Node]:
    """Nodes below a key that should hold the fields of one of our records."""
    if name in _LISTS and isinstance(value, SequenceNode):
        return list(value.value)
    if name in _MAPPINGS and isinstance(value, MappingNode):
        return [node for _, node in value.value]
    return [value] if name in _RECORDS else []


def _nodes(root: Node) -> list[Node]:
    """All nodes, each once."""
    found, left = {id(root): root}, [root]
    while left:
        for child in _children(left.pop()):
            if id(child) not in found:
                found[id(child)] = child
                left.append(child)
    return list(found.values())
