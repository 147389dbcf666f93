"""The method that ``method.name: auto`` became, kept in its run directory: later versions do not change it."""

import json
from pathlib import Path
from typing import Any

from dist_prune import methods
from dist_prune.config.recipe import Recipe
from dist_prune.errors import PruneError
from dist_prune.fileio import read_json, write_atomic

FILE = "method_choice.json"


def keep_choice(folder: Path, recipe: Recipe) -> Recipe:
    """Take the choice that a run directory has recorded, or record that of the recipe.

    Args:
        folder: The run directory, which may be missing.
        recipe: The recipe, with today's recommendation if it says ``auto``.

    Returns:
        The recipe with the recorded method, if its method was chosen for it; else the recipe.

    Raises:
        PruneError: The record is damaged, or names a method that is not here.
    """
    if not recipe.choice:
        return recipe
    file = folder / FILE
    if not file.exists():
        write_atomic(file, json.dumps(_note(recipe), indent=1))
        return recipe
    note = read_json(file)
    name, why, selection = note.get("method"), note.get("why"), note.get("select", {})
    if not isinstance(name, str) or not isinstance(why, str) or not isinstance(selection, dict):
        raise PruneError(f"{file} is damaged: it should name the chosen method. Write method.name=NAME instead")
    if name == recipe.method["name"] and selection == recipe.chosen_selection:
        return recipe.with_choice(why, selection=selection)
    options = methods.find(name).Options().model_dump(mode="json")
    why += f" (recorded in {FILE}; today's choice would be {recipe.method['name']})"
    return recipe.with_choice(why, {"name": name, **options}, selection)


def _note(recipe: Recipe) -> dict[str, Any]:
    return {"method": recipe.method["name"], "select": recipe.chosen_selection, "why": recipe.choice}
