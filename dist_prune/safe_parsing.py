"""YAML and JSON from outside as plain values: bounded in size, depth and numbers, without code. Knows no torch.

Whatever a text holds, reading it ends in values that the rest can walk through, or in a PruneError, within a second.
"""

import json
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from dist_prune.errors import PruneError, shown

LONGEST_YAML = 1_000_000  # characters; a recipe has a few thousand
LARGEST_JSON = 64_000_000  # bytes; the plan of a large network with blocks has a few million
DEEPEST = 40  # mappings and lists inside one another
MOST_NODES = 50_000  # values in all, each alias counted with what it stands for
LARGEST_INT = 2**63 - 1


class MalformedError(PruneError):
    """A text that is no YAML at all, as against YAML that says what it must not."""


def read_yaml(path: Path) -> Any:
    """The values of a YAML file.

    Raises:
        PruneError: it cannot be read, is no YAML, or is larger, deeper or wilder than a document of ours is.
    """
    try:
        if path.stat().st_size > 4 * LONGEST_YAML:
            raise PruneError(f"{path} has {path.stat().st_size:,} bytes; no recipe is that long")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PruneError(f"{path} is not valid YAML: it is no UTF-8 text ({error.reason} at {error.start})") from error
    except (OSError, ValueError) as error:
        raise PruneError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The values of a YAML text; ``where`` says in errors which one it is."""
    if len(text) > LONGEST_YAML:
        raise PruneError(f"{where} has {len(text):,} characters; {LONGEST_YAML:,} are the most")
    try:
        _measure(text, where)
        value = yaml.load(text, Loader=_Plain)  # its constructors make plain values only
    except PruneError:
        raise
    except yaml.constructor.ConstructorError as error:
        raise PruneError(f"{where} is not valid YAML: {_brief(error)}") from error
    except yaml.YAMLError as error:
        raise MalformedError(f"{where} is not valid YAML: {_brief(error)}") from error
    except Exception as error:  # what else constructors stumble over
        raise PruneError(f"{where} is not valid YAML: {type(error).__name__}: {_brief(error)}") from error
    check_plain_values(value, where)
    return value


def parse_json(text: str | bytes, where: str) -> Any:
    """The values of a strict JSON text: no NaN, no infinity, no depth that ends Python's stack."""
    if len(text) > LARGEST_JSON:
        raise PruneError(f"{where} has {len(text):,} bytes; {LARGEST_JSON:,} are the most")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise PruneError(f"{where} is damaged: it is nested too deeply") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise PruneError(f"{where} is damaged, it is no JSON: {_brief(error)}") from error


def read_json(path: Path) -> Any:
    """The values of a strict JSON file; PruneError where it cannot be read or is damaged."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise PruneError(f"{path} has {path.stat().st_size:,} bytes; {LARGEST_JSON:,} are the most")
        raw = path.read_bytes()
    except OSError as error:
        raise PruneError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json(raw, str(path))


def strict_json(value: Any) -> str:
    """Strict JSON, indented by one, for files that others read: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def check_plain_values(value: Any, where: str) -> None:
    """PruneError unless a value is made of mappings with names, lists, texts, numbers that are finite, and nothing."""
    stack = [(value, "", 0)]
    seen = 0
    while stack:
        node, place, depth = stack.pop()
        seen += 1
        at = f"{where}: {place}" if place else where
        if seen > MOST_NODES:
            raise PruneError(f"{where} holds more than {MOST_NODES:,} values; a recipe has a few hundred")
        if depth > DEEPEST:
            raise PruneError(f"{where} is nested deeper than {DEEPEST} levels")
        if isinstance(node, dict):
            for key, inner in node.items():
                if not isinstance(key, str | int) or isinstance(key, bool):  # {0: 128} is a schedule
                    raise PruneError(f"{at}: {shown(key)} is no name of a key")
                stack.append((inner, f"{place}.{_short(key)}" if place else _short(key), depth + 1))
        elif isinstance(node, list):
            stack += [(inner, place, depth + 1) for inner in node]
        elif isinstance(node, int) and abs(node) > LARGEST_INT:
            raise PruneError(f"{at}: {shown(node)} is too large; {LARGEST_INT} is the largest whole number")
        elif isinstance(node, float) and not math.isfinite(node):
            raise PruneError(f"{at}: {node} is no number that a key can have; write a finite one")
        elif not (node is None or isinstance(node, str | int | float)):
            raise PruneError(f"{at}: {shown(node)} is neither a text, a number, a list nor a mapping")


def _short(key: Any) -> str:
    text = shown(key)[:60]
    return text.strip("'")


def _brief(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= 400 else text[:370] + " ..."


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measure(text: str, where: str) -> None:
    """PruneError where the document would be too deep or, its aliases written out, too large; builds nothing."""
    sizes: dict[str, int] = {}  # anchor -> values it stands for
    open_: list[tuple[str | None, int]] = []  # anchor of each collection around, values counted before it
    total = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in {anchor for anchor, _ in open_}:
                raise PruneError(f"{where} is not valid YAML: *{_short(event.anchor)} stands inside what it means")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if len(open_) > DEEPEST:
            raise PruneError(f"{where} is nested deeper than {DEEPEST} levels")
        if total > MOST_NODES:
            raise PruneError(f"{where} holds more than {MOST_NODES:,} values; a recipe has a few hundred")


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML was built with it


class _Plain(_LOADER):
    """YAML's core types only: dates stay texts, and a key that stands twice in a mapping is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in _LOADER.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: make
        for tag, make in _LOADER.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node; ConstructorError with its place for a scalar that is not what its tag says."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown(node.value)} is no {kind}", node.start_mark
            ) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of a node; ConstructorError for a doubled key."""
        own = [pair[0] for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge"]
        mapping = super().construct_mapping(node, deep=deep)
        seen: set[tuple[str, str]] = set()
        for key in own:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"the key {_short(key.value)} stands there twice",
                    key.start_mark,
                )  # fmt: skip
            seen |= {name} if name else set()
        return mapping
