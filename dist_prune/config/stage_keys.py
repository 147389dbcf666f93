"""The stages that read a recipe key, declared in the key's type: ``exif: Loading[bool]``.

A stage's fingerprint is made of the keys that it reads. ``finetune_between`` is the finetuning between two rounds;
``NAME_in_rounds`` adds keys that the stage NAME reads only in runs of several rounds, ``search`` those that the stage
``select`` reads only if it judges networks (``select.search``). Methods' options have their own
declaration (``methods.base.for_select`` and ``growing``).
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
        stages: names of the stages; they read all keys of a section.
        keys: for a section: key -> stages that read this key alone.
        why_not: the reason why no stage's result depends on the key or the section.
    """

    stages: tuple[str, ...] = ()
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    why_not: str = ""


_LEARNING = (
    "train",
    "many",
    "score",
    "repair",
    "search",
    "finetune",
    "finetune_between",
)  # they load training images like the training
_LOADING = (*_LEARNING, "evaluate", "curves", "export")  # export records how images are loaded
Network = Annotated[T, ReadBy((*_LOADING, "select", "prune"))]
Loading = Annotated[T, ReadBy(_LOADING)]
InputShape = Annotated[T, ReadBy((*_LOADING, "select"))]  # select traces the network
Augmentation = Annotated[T, ReadBy(_LEARNING)]
Seed = Annotated[T, ReadBy((*_LEARNING, "prune", "export"))]
# the finetunings recalibrate batch norms on such images
Calibration = Annotated[T, ReadBy(("many", "score", "repair", "finetune", "finetune_between"))]
MicroBatch = Annotated[T, ReadBy(("many", "score", "finetune", "finetune_between", "curves"))]
Repairing = Annotated[T, ReadBy(("repair", "many"))]  # criteria are compared repaired as well
External = Annotated[T, ReadBy(why_not="a path; the digest of the content is compared")]
Operational = Annotated[T, ReadBy(why_not="it changes how work is done, not its result")]


def declared(info: FieldInfo) -> ReadBy | None:
    """The declaration of a recipe's field, or None."""
    return next((item for item in info.metadata if isinstance(item, ReadBy)), None)


def keys_read_by(stage: str, section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys that a stage reads.

    Args:
        stage: name of the stage, as in the ledger.
        section: the model whose fields are searched.
        prefix: dotted path of the section, with a final dot.

    Yields:
        Dotted keys; the section's own key if the stage reads all of it.
    """
    for name, info in section.model_fields.items():
        key, kind = prefix + (info.alias or name), info.annotation
        reads = declared(info) or ReadBy()
        if stage in reads.stages:
            yield key
            continue
        yield from (f"{key}.{inner}" for inner, stages in reads.keys.items() if stage in stages)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys_read_by(stage, kind, f"{key}.")
