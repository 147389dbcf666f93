"""The ``target`` section of a recipe: a share of one cost of the dense network. Knows no torch and counts nothing."""

from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dist_prune.config.section import BATCH, Section

SETTINGS = ("latency_batch", "tolerance", "latency_tolerance")  # keys of ``target`` that are no costs


class Target(Section):
    """The size asked for, as the share of the dense network that is kept; at most one of them.

    The fields are what every run directory has. Other registered costs (pruning/selection/cost.py) are keys as well,
    which a recipe has only if it names one.
    """

    model_config = ConfigDict(extra="allow")
    costs: ClassVar[dict[str, str]] = {}  # names of registered costs that are no field -> what they are
    __pydantic_extra__: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(init=False)  # type: ignore[assignment]
    macs: float | None = Field(default=None, gt=0, le=1, description="share of the dense multiply-accumulates to keep")
    params: float | None = Field(default=None, gt=0, le=1, description="share of the dense parameters to keep")
    channels: float | None = Field(default=None, gt=0, le=1, description="share of the dense channels to keep")
    latency: float | None = Field(
        default=None, gt=0, le=1, description="time of a forward pass on this device, as a share of the dense one's"
    )
    latency_batch: int = Field(default=1, ge=1, le=BATCH, description="images of that forward pass")
    tolerance: float | None = Field(
        default=0.01, gt=0, le=100,
        description="a network that misses target.macs, target.params or target.channels by more than this share of it "
        "ends the run with code 3, after the report; null: no network is refused",
    )  # fmt: skip
    latency_tolerance: float | None = Field(
        default=0.05, gt=0, le=100,
        description="the same for target.latency, whose times scatter; also where its search stops",
    )  # fmt: skip

    @model_validator(mode="after")
    def _one(self):
        given = [name for name, _ in self._shares()]
        if len(given) > 1:
            raise ValueError(f"one target at a time, got {' and '.join(given)}")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _known(cls, section: Any, handler: ValidatorFunctionWrapHandler):
        """Unknown keys are errors, named together with everything else that is wrong."""
        if not isinstance(section, dict):
            return handler(section)
        odd = [key for key in section if key not in cls.model_fields and key not in cls.costs]
        known = {k: v for k, v in section.items() if k in cls.model_fields or (k in cls.costs and v is not None)}
        wrong = [InitErrorDetails(type="extra_forbidden", loc=(str(key),), input=section[key]) for key in odd]
        try:
            made = handler(known)
            if not odd:
                return made
        except ValidationError as error:
            if not odd:
                raise
            wrong += [
                InitErrorDetails(
                    type=PydanticCustomError(item["type"], "{said}", {"said": item["msg"]}),  # type: ignore[arg-type]
                    loc=item["loc"], input=item["input"],
                )
                for item in error.errors()
            ]  # fmt: skip
        raise ValidationError.from_exception_data(cls.__name__, wrong)

    def _shares(self) -> list[tuple[str, float]]:
        """(cost, share) of each target that is set."""
        return [(name, value) for name, value in self if name not in SETTINGS and value is not None]

    def asked(self) -> tuple[str, float] | None:
        """The name of the cost and the share asked for, or None."""
        return next(iter(self._shares()), None)
