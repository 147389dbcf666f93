"""``key=value`` overrides of a recipe: set a key, return one to its default, replace the method."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_prune.config import safe_parsing
from dist_prune.config.earlier_versions import RENAMED
from dist_prune.config.familiar_names import canonical_method
from dist_prune.config.recipe import Recipe
from dist_prune.config.section import section_of
from dist_prune.errors import PruneError, shown

OptionsOf = Callable[[str], type[BaseModel]]
DEEPEST_KEY = 12  # steps of a dotted key
SCALES = ("threshold", "index")  # keys of select whose values are on the scale of one method
_printed: set[str] = set()  # lines that this process has printed


def rename_keys(tree: dict[str, Any]) -> list[str]:
    """Give a recipe's old keys their present names, in place.

    A line is printed for each, unless its value is the default, as in the resolved recipe of an older run.

    Args:
        tree: the recipe as plain values.

    Returns:
        A line for each key that has both names.
    """
    problems = []
    for old, new in RENAMED.items():
        section, _, old_leaf = old.partition(".")
        new_leaf = new.partition(".")[2]
        inner = tree.get(section)
        if not isinstance(inner, dict) or old_leaf not in inner:
            continue
        if new_leaf in inner:
            problems.append(f"{old}: it is called {new} now, and both are given; leave {old} out")
        value = inner.pop(old_leaf)
        inner.setdefault(new_leaf, value)
        field = _field(Recipe, [section, new_leaf])
        default = field.get_default() if isinstance(field, FieldInfo) else None
        if value != (list(default) if isinstance(default, tuple) else default):
            _warn_renamed(old)
    return problems


def _warn_renamed(old: str) -> None:
    notify(f"{old} is called {RENAMED[old]} now; the old name is still read")


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> tuple[list[str], list[list[str]]]:
    """Set ``key=value`` texts in a recipe, in place.

    Args:
        tree: the recipe as plain values.
        overrides: ``a.b=value`` texts; the value is read as YAML.

    Returns:
        A line for each text that is wrong, and the paths of the keys that were set to null.
    """
    problems, parsed = [], []
    keys = {text.partition("=")[0] for text in overrides}
    for text in overrides:
        key, equals, value = text.partition("=")
        if key in RENAMED:
            _warn_renamed(key)
            if RENAMED[key] in keys:
                problems.append(f"{key}: it is called {RENAMED[key]} now, and both are given; leave {key} out")
            key = RENAMED[key]
        path = key.split(".")
        if not equals or not key:
            problems.append(f"override {shown(text)}: write key=value, for example score.images=500")
        elif len(path) > DEEPEST_KEY:
            problems.append(f"override {shown(text)}: no key has more than a few parts")
        else:
            parsed_value, complaints = _parse_value(key, value)
            problems += complaints
            if not complaints:
                parsed.append((path, parsed_value))
    name = next((value for path, value in reversed(parsed) if path == ["method", "name"]), None)
    if isinstance(name, str):
        _change_method(tree, name, [path for path, _ in parsed])
    for (*parents, leaf), value in parsed:
        node = tree
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[leaf] = value
    return problems, [path for path, value in parsed if value is None]


def _parse_value(key: str, text: str) -> tuple[Any, list[str]]:
    """The value after ``key=``, read as YAML, or the text itself if it is not YAML; complaints about it."""
    if not text:
        return None, []
    try:
        return safe_parsing.parse_yaml(text, f"override {key}"), []
    except safe_parsing.MalformedError:
        return text, []
    except PruneError as error:
        return None, [str(error)]


def _change_method(tree: dict[str, Any], name: str, overridden: list[list[str]]) -> None:
    """Replace the method: drop the options of the old one and values on its scale, and print which."""
    method, select = tree.get("method"), tree.get("select")
    name = canonical_method(name)
    if not isinstance(method, dict) or method.get("name") is None or canonical_method(str(method["name"])) == name:
        return
    own = {
        f"method.{key}": value for key, value in method.items() if key != "name" and ["method", key] not in overridden
    }
    tree["method"] = {"name": name}
    if isinstance(select, dict):
        own |= {f"select.{key}": select[key] for key in SCALES if select.get(key) is not None}
        tree["select"] = {key: value for key, value in select.items() if key not in SCALES}
    if own:
        keys = ", ".join(f"{key}={json.dumps(value, default=str)}" for key, value in own.items())
        notify(f"method.name={name[:80]}: the recipe's keys for {method['name']} are left out: {keys[:1000]}")


def remove_nulls(tree: dict[str, Any], nulls: list[list[str]], options_of: OptionsOf | None) -> None:
    """Remove keys that were set to null, so that they have their defaults; keys with null among their values stay.

    Args:
        tree: the recipe as plain values; changed in place.
        nulls: paths of the keys that overrides set to null.
        options_of: method name -> the model of its options; None: keys of methods stay.
    """
    for path in nulls:
        if len(path) < 2:
            continue  # an empty section has its defaults
        node: Any = tree
        for step in path[:-1]:
            node = node.get(step) if isinstance(node, dict) else None
        method = tree.get("method")
        if path[0] != "method":
            field = _field(Recipe, path)
        elif isinstance(method, dict) and isinstance(method.get("name"), str) and options_of is not None:
            try:
                field = _field(options_of(method["name"]), path[1:])
            except PruneError:  # an unknown method is reported with the other errors
                continue
        else:
            continue
        inside = not isinstance(field, FieldInfo) and field  # an entry of a mapping such as select.counts
        known = isinstance(field, FieldInfo) and type(None) not in get_args(field.annotation)
        if isinstance(node, dict) and (inside or known):
            node.pop(path[-1], None)


def _field(model: type[BaseModel], path: list[str]) -> FieldInfo | bool:
    """The field at a path; True if the path leads into a mapping, False if there is none."""
    field: FieldInfo | None = None
    for step in path:
        if field is not None:
            kind = section_of(field.annotation)
            if kind is None:
                return "dict" in str(field.annotation)
            model = kind
        field = next((f for name, f in model.model_fields.items() if step in (name, f.alias)), None)
        if field is None:
            return False
    return field or False


def notify(text: str) -> None:
    """Print a line to stderr, on the first process, once."""
    if os.environ.get("RANK", "0") == "0" and text not in _printed:
        _printed.add(text)
        print(text, file=sys.stderr, flush=True)
