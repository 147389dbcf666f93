"""The base class of recipe sections, bounds of numbers, the type of paths, the models of keys."""

from typing import Annotated, Any, get_args

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


def section_of(kind: Any) -> type[BaseModel] | None:
    """The model of a section, also of one that may be left out (``Search | None``); None for a plain value."""
    models = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)]
    return models[0] if models else None
