"""What every section of a recipe is made of: the base class, bounds of numbers, paths. Knows no torch."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from dist_prune.errors import path_trouble

MANY = 10**9  # images, steps: more than any run has
BATCH = 65536  # images that go through a network together
LONG = 10**6  # epochs, minutes


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, numbers are finite, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


def _path(value: str) -> str:
    if trouble := path_trouble(value):
        raise ValueError(trouble)
    return value


PathText = Annotated[str, AfterValidator(_path)]
