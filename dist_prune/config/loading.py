"""Read a recipe file, apply overrides, say everything that is wrong at once. Knows no torch."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dist_prune import safe_parsing
from dist_prune.config.overrides import OptionsOf, apply_overrides, rename_keys, take_back
from dist_prune.config.recipe import Recipe
from dist_prune.config.recipe_files import find, known_recipes
from dist_prune.errors import PruneError, nearest, shown

__all__ = ["OptionsOf", "UnsetError", "find", "known_recipes", "load", "parse", "reference"]


class UnsetError(PruneError):
    """A recipe that names an environment variable which is not set, and perhaps more that is wrong."""


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
    tree = safe_parsing.read_yaml(path)
    if not isinstance(tree, dict):
        raise PruneError(f"{path}: a recipe is a mapping of sections (backbone, data, method, ...)")
    tree.setdefault("name", path.stem)
    problems = rename_keys(tree)
    found, nulls = apply_overrides(tree, overrides or [])
    problems += [*found, *rename_keys(tree)]
    take_back(tree, nulls, options_of)
    written: dict[str, str] = {}
    tree, unset = _expand(tree, written)
    if unset and need_environment:
        problems += [_unset(key, name, tree) for key, name in unset]
        kind = UnsetError
    else:
        kind = PruneError
    return parse(tree, options_of, where=str(path), problems=problems, kind=kind).with_written(written)


def parse(
    tree: Mapping[str, Any], options_of: OptionsOf | None, where: str, problems: list[str],
    kind: type[PruneError] = PruneError,
) -> Recipe:  # fmt: skip
    """Validate a tree of plain values; ``problems`` found before join the one list of errors, raised as ``kind``."""
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
        raise kind(f"{where}: {len(problems)} error{'s' * (len(problems) > 1)} in the recipe\n{lines}")
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


def _expand(value: Any, written: dict[str, str], where: str = "") -> tuple[Any, list[tuple[str, str]]]:
    """Fill ``${VARIABLE}`` from the environment in every text; (key, variable) of those that are not set.

    ``written`` gets key -> the text before.
    """
    unset: list[tuple[str, str]] = []
    if isinstance(value, dict):
        out = {}
        for key, inner in value.items():
            out[key], found = _expand(inner, written, f"{where}.{key}" if where else str(key))
            unset += found
        return out, unset
    if isinstance(value, list):
        pairs = [_expand(inner, written, f"{where}.{place}") for place, inner in enumerate(value)]
        return [item for item, _ in pairs], [pair for _, found in pairs for pair in found]
    if isinstance(value, str):
        names = re.findall(r"\$\{(\w+)\}", value)
        missing = [name for name in dict.fromkeys(names) if name not in os.environ]
        unset += [(where, name) for name in missing]
        if len(missing) < len(set(names)):
            written[where] = value
            value = re.sub(r"\$\{(\w+)\}", lambda found: os.environ.get(found[1], found[0]), value)
    return value, unset


def _unset(key: str, name: str, tree: Mapping[str, Any]) -> str:
    """What to do about a variable that is not set, and for images: what has to lie where it points."""
    start = f"{key}: the environment variable {name} is not set; "
    data = tree.get("data")
    if key != "data.root" or not isinstance(data, dict):
        return f"{start}export it or write {key}=PATH"
    root = str(data.get("root"))
    if data.get("source") == "imagefolder":
        train, evaluation = data.get("train_split", "train"), data.get("eval_split", "val")
        splits = " and ".join(f"{root}/{split}/<class>/<image>" for split in dict.fromkeys((train, evaluation)))
        both = " and ".join(dict.fromkeys((train, evaluation)))
        return (
            f"{start}the recipe expects {splits}. export {name}=FOLDER, or write data.root=FOLDER for an existing "
            f"folder with {both} in it"
        )
    what = "the .npz file (x_train, y_train, x_test, y_test)" if data.get("source") == "npz" else (
        f"the folder of torchvision's {data.get('source')}")  # fmt: skip
    return (
        f"{start}the recipe expects {root}, {what}. export {name}=FOLDER, or write data.root=PATH for an existing one"
    )


def _sentence(error: Any, model: type[BaseModel], prefix: str = "") -> str:
    """One readable line for one pydantic error."""
    path = [str(step)[:80] for step in error["loc"]]
    key = (prefix + ".".join(path)).rstrip(".")
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
        hint = f" Write {key}.name={given[:80]}." if key in ("method", "backbone") else ""
    if error["type"] == "tuple_type":
        hint = f" Write a list, for example {key}=[{shown(given)}]."
    if error["type"] == "literal_error" and isinstance(given, str):
        hint = nearest(given, re.findall(r"'([^']+)'", message)) or ""
    got = "" if isinstance(given, dict | BaseModel) else f" (got {shown(given)})"
    return f"{key}: {message if len(message) < 600 else message[:570] + ' ...'}{got}.{hint}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for step in path:
        field = model.model_fields.get(step)
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        model = kind
    return [*(field.alias or name for name, field in model.model_fields.items()), *getattr(model, "costs", ())]


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
    for name, what in getattr(model, "costs", {}).items():
        yield prefix + name, FieldInfo(annotation=float, default=None, description=what)
