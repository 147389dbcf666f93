"""Read a recipe file, apply overrides, say everything that is wrong at once. Knows no torch."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dist_prune.errors import PruneError, nearest
from dist_prune.names import find, recipe_folders
from dist_prune.recipe import Recipe

__all__ = ["find", "load", "parse", "recipe_folders", "reference"]

OptionsOf = Callable[[str], type[BaseModel]]


def load(
    name_or_path: str,
    overrides: list[str] | None = None,
    options_of: OptionsOf | None = None,
    need_environment: bool = True,
) -> Recipe:
    """Read a recipe, apply ``key=value`` overrides, validate it.

    Args:
        name_or_path: a YAML file, or a bare name in ``recipes/``.
        overrides: ``a.b=value`` texts; the value is read as YAML.
        options_of: method name -> its options model, so that the method's errors join the list.
        need_environment: whether an unset ``${VARIABLE}`` is an error (a look at a recipe needs no data).

    Raises:
        PruneError: with one line for each thing that is wrong.
    """
    path = find(name_or_path)
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PruneError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise PruneError(f"{path}: a recipe is a mapping of sections (backbone, data, method, ...)")
    tree.setdefault("name", path.stem)
    problems = _override(tree, overrides or [])
    tree, missing = _expand(tree)
    problems += missing if need_environment else []
    return parse(tree, options_of, where=str(path), problems=problems)


def parse(tree: Mapping[str, Any], options_of: OptionsOf | None, where: str, problems: list[str]) -> Recipe:
    """Validate a tree of plain values; ``problems`` found before join the one list of errors."""
    tree = {key: value for key, value in tree.items() if value is not None}  # an empty section has its defaults
    recipe, method = None, tree.get("method")
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += [_sentence(item, Recipe) for item in error.errors()]
    if isinstance(method, dict) and options_of is not None:
        filled, found = _options(method, options_of)
        problems += found
        if recipe is not None:
            recipe = recipe.model_copy(update={"method": filled})
    if problems or recipe is None:
        lines = "\n".join(f"  - {line}" for line in problems)
        raise PruneError(f"{where}: {len(problems)} error{'s' * (len(problems) > 1)} in the recipe\n{lines}")
    return recipe


def _options(method: dict[str, Any], options_of: OptionsOf) -> tuple[dict[str, Any], list[str]]:
    name = method.get("name")
    if not isinstance(name, str):
        return method, ["method.name: missing; name the paper's method, see 'dist-prune list methods'"]
    try:
        model = options_of(name)
    except PruneError as error:
        return method, [f"method.name: {error}"]
    try:
        given = {key: value for key, value in method.items() if key != "name"}
        return {"name": name, **model.model_validate(given).model_dump(mode="json")}, []
    except ValidationError as error:
        return method, [_sentence(item, model, "method.") for item in error.errors()]


def _override(tree: dict[str, Any], overrides: list[str]) -> list[str]:
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(f"override {text!r}: write key=value, for example score.images=500")
            continue
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        try:
            node[leaf] = yaml.safe_load(value) if value else None
        except yaml.YAMLError:
            node[leaf] = value
    return problems


def _expand(value: Any, where: str = "") -> tuple[Any, list[str]]:
    """Fill ``${VARIABLE}`` from the environment in every text."""
    problems: list[str] = []
    if isinstance(value, dict):
        out = {}
        for key, inner in value.items():
            out[key], found = _expand(inner, f"{where}.{key}" if where else str(key))
            problems += found
        return out, problems
    if isinstance(value, list):
        pairs = [_expand(inner, where) for inner in value]
        return [item for item, _ in pairs], [line for _, lines in pairs for line in lines]
    if isinstance(value, str):
        for name in re.findall(r"\$\{(\w+)\}", value):
            if name in os.environ:
                value = value.replace("${" + name + "}", os.environ[name])
            else:
                problems.append(f"{where}: the environment variable {name} is not set; export it or write {where}=PATH")
    return value, problems


def _sentence(error: Any, model: type[BaseModel], prefix: str = "") -> str:
    """One readable line for one pydantic error."""
    path = [str(step) for step in error["loc"]]
    key = prefix + ".".join(path)
    if error["type"] == "extra_forbidden":
        allowed = _fields_at(model, path[:-1])
        hint = nearest(path[-1], allowed) or f" Allowed here: {', '.join(allowed)}."
        return f"{key}: unknown key.{hint}"
    if error["type"] == "missing":
        return f"{key}: missing, and it has no default"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    hint = ""
    if error["type"] in ("model_type", "dict_type") and isinstance(given, str):
        hint = f" Write {key}.name={given}." if key in ("method", "backbone") else ""
    if error["type"] == "tuple_type":
        hint = f" Write a list, for example {key}=[{given}]."
    if error["type"] == "literal_error" and isinstance(given, str):
        hint = nearest(given, re.findall(r"'([^']+)'", message)) or ""
    shown = "" if isinstance(given, dict | BaseModel) else f" (got {given!r})"
    return f"{key}: {message}{shown}.{hint}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for step in path:
        field = model.model_fields.get(step)
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        model = kind
    return [field.alias or name for name, field in model.model_fields.items()]


def reference(model: type[BaseModel] = Recipe, prefix: str = "") -> str:
    """Every key of a recipe, or of a method's options, as a Markdown table (``dist-prune list keys [METHOD]``)."""
    rows = ["| key | default | what |", "|---|---|---|"]
    for key, field in _keys(model, prefix):
        default = "required" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
        kind = re.sub(r"typing\.|Annotated\[|, BeforeValidator.*|, FieldInfo.*", "", str(field.annotation))
        choices = ", ".join(re.findall(r"'([^']+)'", kind)) if "Literal" in kind else ""
        what = "; ".join(part for part in (field.description or "", choices) if part)
        rows.append(f"| `{key}` | {default} | {what} |")
    return "\n".join(rows)


def _keys(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if name != "finetune":  # the same keys as train
                yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + (field.alias or name), field
