"""The recipe section on the size of the pruned network: Target. It counts nothing itself."""

from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dist_prune.config.section import BATCH, Section

SETTINGS = ("latency_batch", "tolerance", "latency_tolerance")  # keys of ``target`` that name no cost


class Target(Section):
    """The size of the pruned network as a share of one cost of the dense network; at most one cost.

    The fields are in every resolved recipe. Other registered costs (pruning/selection/cost.py) are keys as well, which
    a resolved recipe has only if it sets them.
    """

    model_config = ConfigDict(extra="allow")
    costs: ClassVar[dict[str, str]] = {}  # names of registered costs that have no field -> description
    __pydantic_extra__: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(init=False)  # type: ignore[assignment]
    macs: float | None = Field(default=None, gt=0, le=1, description="share of the dense multiply-accumulates to keep")
    params: float | None = Field(default=None, gt=0, le=1, description="share of the dense parameters to keep")
    channels: float | None = Field(default=None, gt=0, le=1, description="share of the dense channels to keep")
    latency: float | None = Field(
        default=None, gt=0, le=1, description="share of the dense network's time of a forward pass, on this device"
    )
    latency_batch: int = Field(default=1, ge=1, le=BATCH, description="number of images of that forward pass")
    tolerance: float | None = Field(
        default=0.01,
        gt=0,
        le=100,
        description="largest miss of target.macs, target.params or target.channels, as a share of it; a larger one "
        "ends "
        "the run with exit code 3, after the report; null: any miss is accepted",
    )
    latency_tolerance: float | None = Field(
        default=0.05,
        gt=0,
        le=100,
        description="largest miss of target.latency, whose times scatter; also the precision at which its search stops",
    )

    @model_validator(mode="after")
    def _check_one_cost(self):
        costs = [name for name, _ in self._shares()]
        if len(costs) > 1:
            raise ValueError(f"one target at a time, got {' and '.join(costs)}")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _check_keys(cls, section: Any, handler: ValidatorFunctionWrapHandler):
        """Refuse unknown keys, in one list with everything else that is wrong."""
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
        """(cost, share) of each cost that is set."""
        return [(name, value) for name, value in self if name not in SETTINGS and value is not None]

    def asked(self) -> tuple[str, float] | None:
        """The name of the cost and the share to keep; None if no target is set."""
        return next(iter(self._shares()), None)
