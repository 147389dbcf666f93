"""The recommended method for three situations: ``method: {name: auto}`` takes it, and says why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"


@dataclass(frozen=True)
class Recommendation:
    """A method for a situation.

    Attributes:
        method: its name.
        situation: what there is, as a clause.
        why: the evidence, as a clause.
    """

    method: str
    situation: str
    why: str

    @property
    def text(self) -> str:
        """A line for the log and the report."""
        return f"method.name=auto: {self.method} is taken, because there are {self.situation}: {self.why}"


WEIGHTS_ALONE = Recommendation(
    "l1",
    "no labels to rank channels by",
    "it reads the weights alone, and no method that looks at images without their labels ranked better without a "
    "finetuning",
)
_BY_LOSS = "one forward and one backward pass measure each channel's share of the loss"
LABELS = Recommendation("taylor", "labelled images and no finetuning", _BY_LOSS)
LABELS_AND_TIME = Recommendation("taylor", "labelled images and a finetuning", _BY_LOSS)


def recommend(recipe: Mapping[str, Any], labels: bool = True) -> Recommendation:
    """The recommendation for what a recipe has.

    Args:
        recipe: section or key -> value, as plain values; it need not be valid.
        labels: whether the images have labels.
    """
    if not labels:
        return WEIGHTS_ALONE
    finetune = recipe.get("finetune")
    return LABELS_AND_TIME if isinstance(finetune, Mapping) and finetune.get("epochs") else LABELS
