"""Which stages read a recipe key, declared in the key's type: ``exif: Loading[bool]``.

A stage's fingerprint is made of the keys that it reads. ``finetune_between`` is the finetuning between two rounds;
``NAME_in_rounds`` adds keys that the stage NAME reads only in runs of several rounds. Methods' options have their own
declaration (``methods.base.for_select`` and ``growing``). Knows no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

T = TypeVar("T")


@dataclass(frozen=True)
class ReadBy:
    """Metadata of a key: the stages whose results depend on it.

    Attributes:
        stages: of a section: it is read as a whole.
        keys: key of the section -> stages that read this key alone.
        why_not: why no stage's result depends on the key or the section.
    """

    stages: tuple[str, ...] = ()
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    why_not: str = ""


_LEARNING = ("train", "many", "score", "finetune", "finetune_between")  # they see training images as training does
_LOADING = (*_LEARNING, "evaluate", "curves", "export")  # export writes down how images are loaded
Network = Annotated[T, ReadBy((*_LOADING, "select", "prune"))]
Loading = Annotated[T, ReadBy(_LOADING)]
InputShape = Annotated[T, ReadBy((*_LOADING, "select"))]  # select traces the network
Augmentation = Annotated[T, ReadBy(_LEARNING)]
Seed = Annotated[T, ReadBy((*_LEARNING, "prune", "export"))]
Calibration = Annotated[T, ReadBy(("many", "score", "finetune", "finetune_between"))]  # batch norms: as scoring
MicroBatch = Annotated[T, ReadBy(("many", "score", "finetune", "finetune_between", "curves"))]
External = Annotated[T, ReadBy(why_not="a path; the digest of the content is compared")]
Operational = Annotated[T, ReadBy(why_not="how work is done, not what it results in")]


def declared(info: FieldInfo) -> ReadBy | None:
    """The declaration of a recipe's field; None if it has none."""
    return next((one for one in info.metadata if isinstance(one, ReadBy)), None)


def keys_read_by(stage: str, section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys that a stage reads; a section that is read as a whole by its own name."""
    for name, info in section.model_fields.items():
        key, kind, reads = prefix + (info.alias or name), info.annotation, declared(info) or ReadBy()
        if stage in reads.stages:
            yield key
            continue
        yield from (f"{key}.{inner}" for inner, stages in reads.keys.items() if stage in stages)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys_read_by(stage, kind, f"{key}.")
