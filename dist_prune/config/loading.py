"""Load a recipe: read its file, apply overrides, validate it, and report all errors at once."""

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dist_prune.config import safe_parsing
from dist_prune.config.familiar_names import canonical_method, key_suggestion
from dist_prune.config.overrides import OptionsOf, apply_overrides, remove_nulls, rename_keys
from dist_prune.config.pruning import Target
from dist_prune.config.recipe import Recipe
from dist_prune.config.recipe_files import find, known_recipes
from dist_prune.config.recommendation import AUTO, OWN_SELECTION, recommend
from dist_prune.config.section import section_of
from dist_prune.errors import PruneError, nearest, shown

__all__ = ["OptionsOf", "UnsetError", "find", "known_recipes", "load", "parse", "reference"]


class UnsetError(PruneError):
    """A recipe names an environment variable that is not set; it may have other errors too."""


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
        options_of: method name -> the model of its options, to validate them too; None: they are not validated.
        need_environment: whether an unset ``${VARIABLE}`` is an error; showing a recipe needs no data.

    Raises:
        UnsetError: if a variable is not set; with a line for each error of the recipe.
        PruneError: for all other errors; with a line for each.
    """
    path = find(name_or_path)
    tree = safe_parsing.read_yaml(path)
    if not isinstance(tree, dict):
        raise PruneError(f"{path}: a recipe is a mapping of sections (backbone, data, method, ...)")
    tree.setdefault("name", path.stem)
    problems = rename_keys(tree)
    complaints, nulls = apply_overrides(tree, overrides or [])
    problems += [*complaints, *rename_keys(tree)]
    remove_nulls(tree, nulls, options_of)
    written: dict[str, str] = {}
    tree, unset = _fill_variables(tree, written)
    if unset and need_environment:
        problems += [_unset_text(key, name, tree) for key, name in unset]
        kind = UnsetError
    else:
        kind = PruneError
    return parse(tree, options_of, where=str(path), problems=problems, kind=kind).with_written(written)


def parse(
    tree: Mapping[str, Any],
    options_of: OptionsOf | None,
    where: str,
    problems: list[str],
    kind: type[PruneError] = PruneError,
) -> Recipe:
    """Validate a recipe of plain values.

    Args:
        tree: section or key -> value.
        options_of: method name -> the model of its options; None: they are not validated.
        where: the recipe's name in errors.
        problems: errors that were found before; they join the list.
        kind: class of the error that is raised.

    Raises:
        PruneError: with a line for each error.
    """
    tree = {key: value for key, value in tree.items() if value is not None}  # an empty section has its defaults
    recipe, method, chosen = None, tree.get("method"), None
    selection: dict[str, Any] = {}
    if isinstance(method, dict) and method.get("name") == AUTO:
        chosen = recommend(tree)
        if options := sorted(set(method) - {"name"}):
            problems.append(f"method.{options[0]}: {AUTO} has no keys; name the method to set its own")
        method = {"name": chosen.method}
        own = tree.get("select") or {}
        if isinstance(own, Mapping) and not any(own.get(key) is not None for key in OWN_SELECTION):
            selection = dict(chosen.selection)
        tree = {**tree, "method": method, **({"select": {**own, **selection}} if selection else {})}
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += [error_text(item, Recipe) for item in error.errors()]
    if recipe is not None:
        compare = tuple(map(canonical_method, recipe.score.compare))
        recipe = recipe.model_copy(update={"score": recipe.score.model_copy(update={"compare": compare})})
    if isinstance(method, dict) and options_of is not None:
        filled, complaints = _validate_options(method, options_of)
        problems += complaints
        if recipe is not None:
            recipe = recipe.model_copy(update={"method": filled})
    if recipe is not None and chosen is not None:
        recipe = recipe.with_choice(chosen.text, selection=selection)
    if problems or recipe is None:
        lines = "\n".join(f"  - {line}" for line in problems)
        raise kind(f"{where}: {len(problems)} error{'s' * (len(problems) > 1)} in the recipe\n{lines}")
    return recipe


def _validate_options(method: dict[str, Any], options_of: OptionsOf) -> tuple[dict[str, Any], list[str]]:
    name = method.get("name")
    if not isinstance(name, str):
        return method, ["method.name: missing; name the paper's method, see 'dist-prune list methods'"]
    name = canonical_method(name)
    try:
        model = options_of(name)
    except PruneError as error:
        return method, [f"method.name: {error}"]
    try:
        options = {key: value for key, value in method.items() if key != "name"}
        return {"name": name, **model.model_validate(options).model_dump(mode="json")}, []
    except ValidationError as error:
        return method, [error_text(item, model, "method.") for item in error.errors()]


def _fill_variables(value: Any, written: dict[str, str], where: str = "") -> tuple[Any, list[tuple[str, str]]]:
    """Fill ``${VARIABLE}`` from the environment into every text.

    Args:
        value: plain values.
        written: gets dotted key -> the text before; changed in place.
        where: dotted key of ``value``.

    Returns:
        The filled values, and (key, variable) of each variable that is not set.
    """
    unset: list[tuple[str, str]] = []
    if isinstance(value, dict):
        filled = {}
        for key, inner in value.items():
            filled[key], more = _fill_variables(inner, written, f"{where}.{key}" if where else str(key))
            unset += more
        return filled, unset
    if isinstance(value, list):
        pairs = [_fill_variables(inner, written, f"{where}.{index}") for index, inner in enumerate(value)]
        return [item for item, _ in pairs], [pair for _, more in pairs for pair in more]
    if isinstance(value, str):
        names = re.findall(r"\$\{(\w+)\}", value)
        missing = [name for name in dict.fromkeys(names) if name not in os.environ]
        unset += [(where, name) for name in missing]
        if len(missing) < len(set(names)):
            written[where] = value
            value = re.sub(r"\$\{(\w+)\}", lambda match: os.environ.get(match[1], match[0]), value)
    return value, unset


def fill_here(recipe: Recipe, section: str, key: str) -> str:
    """A text of the recipe with ``${VARIABLES}`` of this process's environment: rank 0 loads the recipe for all.

    Args:
        recipe: the recipe.
        section: ``data``, for example.
        key: of the text in that section.

    Raises:
        UnsetError: a variable is not set here.
    """
    text, unset = _fill_variables(recipe.written()[section][key], {})
    if unset:
        raise UnsetError(
            f"{section}.{key}: the environment variable {unset[0][1]} is not set on {socket.gethostname()}"
        )
    return text


def _unset_text(key: str, name: str, tree: Mapping[str, Any]) -> str:
    """The error for a variable that is not set; for images, with the files that the recipe expects."""
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
    content = f"the folder of torchvision's {data.get('source')}"
    if data.get("source") in ("tar", "parquet"):
        content = f"the {data['source']} files of both splits"
    if data.get("source") == "npz":
        content = "the .npz file (x_train, y_train, x_test, y_test)"
    return (
        f"{start}the recipe expects {root}, {content}. "
        f"export {name}=FOLDER, or write data.root=PATH for an existing one"
    )


def error_text(error: Any, model: type[BaseModel], prefix: str = "") -> str:
    """One readable line for one pydantic error.

    Args:
        error: of ``ValidationError.errors()``.
        model: the section that was validated.
        prefix: of the section's keys, for example ``method.``.
    """
    path = [str(step)[:80] for step in error["loc"]]
    key = (prefix + ".".join(path)).rstrip(".")
    if error["type"] == "extra_forbidden":
        allowed = _fields_at(model, path[:-1])
        hint = key_suggestion(path[-1], allowed, path[-2] if len(path) > 1 else prefix.rstrip("."))
        hint = hint or f" Allowed here: {', '.join(allowed)}."
        return f"{key}: unknown key.{hint}"
    if error["type"] == "missing":
        return f"{key}: missing, and it has no default"
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    hint = ""
    if error["type"] in ("model_type", "dict_type") and isinstance(value, str):
        hint = f" Write {key}.name={value[:80]}." if key in ("method", "backbone", "task") else ""
    if error["type"] == "tuple_type":
        hint = f" Write a list, for example {key}=[{shown(value)}]."
    if error["type"] == "literal_error" and isinstance(value, str):
        hint = nearest(value, re.findall(r"'([^']+)'", message)) or ""
    got = "" if isinstance(value, dict | BaseModel) else f" (got {shown(value)})"
    return f"{key}: {message if len(message) < 600 else message[:570] + ' ...'}{got}.{hint}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for step in path:
        field = next((info for name, info in model.model_fields.items() if step in (name, info.alias)), None)
        kind = section_of(field.annotation) if field else None
        if kind is None:
            return []
        model = kind
    return [*(field.alias or name for name, field in model.model_fields.items()), *_other_costs(model)]


def reference(model: type[BaseModel] = Recipe, prefix: str = "") -> str:
    """Every key of a recipe, or of a method's options, as a Markdown table (``dist-prune list keys [METHOD]``).

    Args:
        model: the recipe's model, or that of a method's options.
        prefix: start of every key, for example ``method.``.
    """
    rows = ["| key | default | what |", "|---|---|---|"]
    for key, field in _keys(model, prefix):
        default = "required" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
        kind = re.sub(r"typing\.|Annotated\[|, BeforeValidator.*|, FieldInfo.*", "", str(field.annotation))
        choices = ", ".join(re.findall(r"'([^']+)'", kind)) if "Literal" in kind else ""
        caption = "; ".join(filter(None, (field.description, choices)))
        rows.append(f"| `{key}` | {default} | {caption} |")
    return "\n".join(rows)


def _keys(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = section_of(field.annotation)
        if kind is not None:
            if name != "finetune":  # the same keys as train
                yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + (field.alias or name), field
    for name, caption in _other_costs(model).items():
        yield prefix + name, FieldInfo(annotation=float, default=None, description=caption)


def _other_costs(model: type[BaseModel]) -> dict[str, str]:
    return model.other_costs() if issubclass(model, Target) else {}
