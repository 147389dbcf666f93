"""The recommended method for three situations: ``method: {name: auto}`` takes it, and says why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

AUTO = "auto"


@dataclass(frozen=True)
class Recommendation:
    """A method for a situation.

    Attributes:
        method: its name.
        situation: what there is, as a clause.
        why: the evidence, as a clause.
        selection: keys of ``select`` that belong to it; a recipe that sets one of ``OWN_SELECTION`` keeps its own.
    """

    method: str
    situation: str
    why: str
    selection: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """A line for the log and the report."""
        keys = ", ".join(f"select.{key}={value}" for key, value in self.selection.items())
        how = f" with {keys} unless the recipe selects otherwise" if keys else ""
        return f"method.name=auto: {self.method} is taken{how}, because there are {self.situation}: {self.why}"


OWN_SELECTION = ("scope", "max_ratio", "keep_ratios", "counts", "threshold", "plan")
_BY_LOSS = (
    "it was far ahead at the same MACs on MobileNetV2 and near the best on two ResNets, ranked over all groups "
    "(docs/which-method.md)"
)
_OVER_ALL = {"scope": "global", "max_ratio": 0.9}
IMAGES = Recommendation(
    "reconstruction",
    "images without labels",
    "it was the best of those that need no labels on three networks, ranked over all groups (docs/which-method.md)",
    _OVER_ALL,
)
LABELS = Recommendation("group_fisher", "labelled images and no finetuning", _BY_LOSS, _OVER_ALL)
LABELS_AND_TIME = Recommendation("group_fisher", "labelled images and a finetuning", _BY_LOSS, _OVER_ALL)


def recommend(recipe: Mapping[str, Any], labels: bool = True) -> Recommendation:
    """The recommendation for what a recipe has.

    Args:
        recipe: section or key -> value, as plain values; it need not be valid.
        labels: whether the images have labels.
    """
    if not labels:
        return IMAGES
    finetune = recipe.get("finetune")
    return LABELS_AND_TIME if isinstance(finetune, Mapping) and finetune.get("epochs") else LABELS
