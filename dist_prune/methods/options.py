"""Options of methods: the base model, which stage reads an option, quirks of released code. Torch-free."""

from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Quirk = TypeVar("Quirk", bound=str)


class MethodOptions(BaseModel):
    """The base model of a method's options, the keys of a recipe's ``method`` section beside ``name``.

    A field is read by ``score``, and is part of the fingerprint of the score file, unless it is declared with
    ``select_only``. Its ``description`` is a noun caption with its unit, for the tables of the reference.

    Attributes:
        fidelity: the form of the method: the paper's mathematics, or the released code.
        quirks: single departures of the released code.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    fidelity: Literal["correct", "as_released"] = Field(
        default="correct", description="form of the method; correct, the paper's mathematics, is the only one here"
    )
    quirks: tuple[Any, ...] = Field(default=(), max_length=0, description="departures of the released code; none here")

    @field_validator("fidelity")
    @classmethod
    def _has_a_release(cls, value: str) -> str:
        if value == "as_released" and not issubclass(cls, QuirkOptions):
            raise ValueError("this method has one form, correct; no departure of a released program is known")
        return value

    @classmethod
    def score_options(cls) -> tuple[str, ...]:
        """Names of the options that ``score`` reads; a run directory keeps their values."""
        return tuple(
            name
            for name, field in cls.model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("read_by") == "select")
        )

    @classmethod
    def refinable_options(cls) -> tuple[str, ...]:
        """Names of the score options that a run directory may raise later (``refinable``)."""
        return tuple(
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("read_by") == "growing"
        )


def refinable(default: Any, **constraints: Any) -> Any:
    """Declare an option that says how much is measured: a larger value later refines the same scores.

    The method records its measurements by the argument ``keep`` of ``ScoringContext.map_jobs``, so raising the option
    in a run directory repeats none of them.

    Args:
        default: of the option.
        **constraints: other arguments of ``pydantic.Field`` (``ge``, ``description`` and so on).
    """
    return Field(default=default, json_schema_extra={"read_by": "growing"}, **constraints)


def select_only(default: Any, **constraints: Any) -> Any:
    """Declare an option that only ``select`` reads: runs that differ in it share one score file.

    Args:
        default: of the option.
        **constraints: other arguments of ``pydantic.Field`` (``ge``, ``description`` and so on).
    """
    return Field(default=default, json_schema_extra={"read_by": "select"}, **constraints)


class QuirkOptions(MethodOptions, Generic[Quirk]):
    """Mixin for a method whose released code departs from the paper: ``class Options(QuirkOptions[Quirk], ...)``.

    ``Quirk`` is a ``Literal`` of the names of the departures. Each is a function of that name in the paper's file.

    Attributes:
        released: the quirks that ``fidelity=as_released`` selects; None: all of them.
        quirks: the quirks that the recipe selects, in addition to those of ``fidelity``.
    """

    released: ClassVar[tuple[str, ...] | None] = None
    quirks: tuple[Quirk, ...] = Field(default=(), description="departures of the released code, selected one by one")

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        names = "every quirk" if cls.released is None else f"quirks {', '.join(cls.released)}"
        cls.model_fields["fidelity"].description = f"as_released: {names}"

    def has(self, quirk: str) -> bool:
        """Whether the options select a quirk, by ``quirks`` or by ``fidelity=as_released``.

        Args:
            quirk: name of the departure.

        Raises:
            KeyError: the method has no quirk of that name.
        """
        names = get_args(get_args(type(self).model_fields["quirks"].annotation)[0])
        if quirk not in names:
            raise KeyError(f"{quirk!r} is not one of the quirks {', '.join(names)}")
        released = names if self.released is None else self.released
        return quirk in self.quirks or (self.fidelity == "as_released" and quirk in released)


class RankingOptions(MethodOptions):
    """Options of ``RankingMethod``.

    Attributes:
        normalise: whether a group's scores are divided by their mean absolute value before groups are compared.
    """

    normalise: bool = select_only(
        True,
        description="select.scope global: division of each group's scores by their mean before groups are compared",
    )


class CoupledOptions(RankingOptions):
    """Options of methods that score each layer of a coupled group.

    Attributes:
        combine: reduction of the layers' scores to one score of the group: the leader's, or the sum or the mean over
            all layers, each divided by its mean absolute value first.
    """

    combine: Literal["leader", "sum", "mean"] = select_only(
        "sum", description="reduction of the scores of a group's layers to one score"
    )
