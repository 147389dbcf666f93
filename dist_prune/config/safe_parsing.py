"""Safe parsing of YAML and JSON from outside: no code, and bounds on size, depth and numbers.

Any text ends in plain values or in a ``PruneError``, within a second.
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
DEEPEST = 40  # levels of nested mappings and lists
MOST_NODES = 50_000  # values in all; each alias counts with its whole content
LARGEST_INT = 2**63 - 1


class MalformedError(PruneError):
    """A text that is not YAML at all, unlike YAML with forbidden content."""


def read_yaml(path: Path) -> Any:
    """The values of a YAML file.

    Raises:
        PruneError: if it cannot be read, is not YAML, or breaks a bound of this module.
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
    """The values of a YAML text.

    Args:
        text: the YAML.
        where: the text's name in errors, for example its path.

    Raises:
        MalformedError: if it is not YAML.
        PruneError: if it has content that is not plain, or breaks a bound of this module.
    """
    if len(text) > LONGEST_YAML:
        raise PruneError(f"{where} has {len(text):,} characters; {LONGEST_YAML:,} are the most")
    try:
        _check_size(text, where)
        value = yaml.load(text, Loader=_PlainLoader)  # its constructors make plain values only
    except PruneError:
        raise
    except yaml.constructor.ConstructorError as error:
        raise PruneError(f"{where} is not valid YAML: {_brief(error)}") from error
    except yaml.YAMLError as error:
        raise MalformedError(f"{where} is not valid YAML: {_brief(error)}") from error
    except Exception as error:  # constructors fail in further ways
        raise PruneError(f"{where} is not valid YAML: {type(error).__name__}: {_brief(error)}") from error
    check_plain_values(value, where)
    return _unshared(value)


def _unshared(value: Any) -> Any:
    """A copy in which an anchor and each of its aliases are values of their own: a change of one leaves the others."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def parse_json(text: str | bytes, where: str) -> Any:
    """The values of a strict JSON text, without NaN and infinity.

    Args:
        text: the JSON.
        where: the text's name in errors, for example its path.

    Raises:
        PruneError: if it is too long, nested too deeply, or not JSON.
    """
    if len(text) > LARGEST_JSON:
        raise PruneError(f"{where} has {len(text):,} bytes; {LARGEST_JSON:,} are the most")
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise PruneError(f"{where} is damaged: it is nested too deeply") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise PruneError(f"{where} is damaged, it is no JSON: {_brief(error)}") from error


def read_json(path: Path) -> Any:
    """The values of a strict JSON file; PruneError if it cannot be read or is damaged."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise PruneError(f"{path} has {path.stat().st_size:,} bytes; {LARGEST_JSON:,} are the most")
        raw = path.read_bytes()
    except OSError as error:
        raise PruneError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json(raw, str(path))


def strict_json(value: Any) -> str:
    """Strict JSON, indented by one, for files that other programs read; NaN and infinity become null."""
    return json.dumps(_replace_infinite(value), indent=1, allow_nan=False)


def check_plain_values(value: Any, where: str) -> None:
    """Check that a value is made of mappings, lists, texts, finite numbers and None, within the bounds of this module.

    Args:
        value: the value.
        where: its name in errors.

    Raises:
        PruneError: naming the place of the first value that is not.
    """
    stack = [(value, "", 0)]
    seen = 0
    while stack:
        node, key_path, depth = stack.pop()
        seen += 1
        at = f"{where}: {key_path}" if key_path else where
        if seen > MOST_NODES:
            raise PruneError(f"{where} holds more than {MOST_NODES:,} values; a recipe has a few hundred")
        if depth > DEEPEST:
            raise PruneError(f"{where} is nested deeper than {DEEPEST} levels")
        if isinstance(node, dict):
            for key, inner in node.items():
                if not isinstance(key, str | int) or isinstance(key, bool):  # {0: 128} is a schedule
                    raise PruneError(f"{at}: {shown(key)} is no name of a key")
                stack.append((inner, f"{key_path}.{_short(key)}" if key_path else _short(key), depth + 1))
        elif isinstance(node, list):
            stack += [(inner, key_path, depth + 1) for inner in node]
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


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _replace_infinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_infinite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_infinite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_size(text: str, where: str) -> None:
    """Raise a PruneError if the document is too deep or, with its aliases written out, too large; builds nothing."""
    sizes: dict[str, int] = {}  # anchor -> number of values in it
    open_collections: list[tuple[str | None, int]] = []  # anchor of each, number of values before it
    total = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in {anchor for anchor, _ in open_collections}:
                raise PruneError(f"{where} is not valid YAML: *{_short(event.anchor)} is inside its own anchor")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_collections.pop()
            if anchor:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if len(open_collections) > DEEPEST:
            raise PruneError(f"{where} is nested deeper than {DEEPEST} levels")
        if total > MOST_NODES:
            raise PruneError(f"{where} holds more than {MOST_NODES:,} values; a recipe has a few hundred")


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml if PyYAML was built with it


class _PlainLoader(_LOADER):
    """YAML's core types only: dates stay texts, and a duplicate key of a mapping is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in _LOADER.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: make
        for tag, make in _LOADER.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node; ConstructorError with its place for a scalar that does not fit its tag."""
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
        """The mapping of a node; ConstructorError for a duplicate key."""
        own = [pair[0] for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge"]
        mapping = super().construct_mapping(node, deep=deep)
        seen: set[tuple[str, str]] = set()
        for key in own:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                problem = f"the key {_short(key.value)} occurs twice"
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, problem, key.start_mark
                )
            seen |= {name} if name else set()
        return mapping
