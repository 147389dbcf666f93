"""The base class of recipe sections, bounds of numbers, and the type of paths."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from dist_prune.errors import path_trouble

MANY = 10**9  # largest number of images and of steps
BATCH = 65536  # largest number of images in one forward pass
LONG = 10**6  # largest number of epochs, minutes or channels


class Section(BaseModel):
    """A section of a recipe: it refuses unknown keys and infinite numbers, and is frozen after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


def _check_path(value: str) -> str:
    if trouble := path_trouble(value):
        raise ValueError(trouble)
    return value


PathText = Annotated[str, AfterValidator(_check_path)]
