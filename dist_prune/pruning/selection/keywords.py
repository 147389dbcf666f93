"""The selection that a call of the library asks for, from its keyword arguments."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dist_prune.config.familiar_names import KEYWORD_RELATIVES
from dist_prune.config.loading import error_text
from dist_prune.config.pruning import Select, Target
from dist_prune.errors import PruneError, shown
from dist_prune.pruning.selection.cost import COSTS
from dist_prune.pruning.selection.ranking import SelectionRequest

M = TypeVar("M", bound=BaseModel)


def _validated(model: type[M], values: Mapping[str, Any], prefix: str) -> M:
    """A section of plain values; a PruneError names each key that is unknown or has a value that is not allowed."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise PruneError("\n".join(error_text(item, model, prefix) for item in error.errors())) from error


def read_keywords(
    keywords: Mapping[str, Any], target: Mapping[str, float] | None, seed: int
) -> tuple[SelectionRequest, tuple[str, ...], Target]:
    """Check the keywords of ``dist_prune.select`` and ``dist_prune.search``.

    Args:
        keywords: keys of a recipe's ``select`` section.
        target: name of one cost -> share of it that is kept.
        seed: decides among channels that are worth the same.

    Returns:
        The request, the globs of ``exclude``, and the target with its tolerances.

    Raises:
        PruneError: a key is unknown, its value is not allowed, or it belongs to a run.
    """
    for name in keywords.keys() & KEYWORD_RELATIVES.keys():
        raise PruneError(f"{name}: dist_prune.select has no argument of this name. Write {KEYWORD_RELATIVES[name]}")
    for name in keywords.keys() & COSTS.keys():
        raise PruneError(f"{name}: it is a cost: write target={{'{name}': {shown(keywords[name])}}}")
    if target is not None and not isinstance(target, Mapping):
        raise PruneError(f"target: {shown(target)} is given; write a cost and its share, for example {{'macs': 0.5}}")
    section = _validated(Select, keywords, "")
    wanted = _validated(Target, target or {}, "target.")
    if section.plan is not None:
        raise PruneError("plan: a plan from a file is read by Plan.from_json, not selected")
    if section.search is not None or section.from_ is not None:
        raise PruneError("search: dist_prune.search finds the ratios; from: a run takes the result of another one")
    values = section.model_dump(exclude={"exclude", "plan", "search", "from_", "norms"})
    return SelectionRequest(**values, target=wanted.asked(), seed=seed), section.exclude, wanted
