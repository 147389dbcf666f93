"""Options of methods: what every method has, who reads an option, departures of released code. Knows no torch."""

from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Quirk = TypeVar("Quirk", bound=str)


class MethodOptions(BaseModel):
    """A method's options in the recipe. An option that ``select`` reads is declared with ``select_only``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    fidelity: Literal["correct", "as_released"] = Field(
        default="correct", description="correct: as the mathematics says; the only one here"
    )
    quirks: tuple[Any, ...] = Field(
        default=(), max_length=0, description="single departures of the released code; none here"
    )

    @field_validator("fidelity")
    @classmethod
    def _has_a_release(cls, value: str) -> str:
        if value == "as_released" and not issubclass(cls, QuirkOptions):
            raise ValueError("this method has one form, correct; no departure of a released program is known")
        return value

    @classmethod
    def score_options(cls) -> tuple[str, ...]:
        """The options that scoring reads: a run directory is bound to them."""
        return tuple(
            name
            for name, field in cls.model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("read_by") == "select")
        )

    @classmethod
    def refinable_options(cls) -> tuple[str, ...]:
        """Those of them that a run directory may raise later: what was measured before is used again."""
        return tuple(
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("read_by") == "growing"
        )


def refinable(default: Any, **constraints: Any) -> Any:
    """An option that says how much is measured (share's ``keep``): more of it later refines the same scores."""
    return Field(default=default, json_schema_extra={"read_by": "growing"}, **constraints)


def select_only(default: Any, **constraints: Any) -> Any:
    """An option that only ``select`` reads: runs that differ in it share one score file."""
    return Field(default=default, json_schema_extra={"read_by": "select"}, **constraints)


class QuirkOptions(MethodOptions, Generic[Quirk]):
    """Mixin for a method whose released code departs from the paper: ``class Options(QuirkOptions[Quirk], ...)``.

    ``Quirk`` is a ``Literal`` of the departures' names; each is a function of its name in the paper's file.

    Class attributes:
        released: the quirks that ``fidelity=as_released`` stands for; None: every one.
    """

    released: ClassVar[tuple[str, ...] | None] = None
    quirks: tuple[Quirk, ...] = Field(default=(), description="single departures of the released code")

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        names = "every quirk" if cls.released is None else f"quirks {', '.join(cls.released)}"
        cls.model_fields["fidelity"].description = f"as_released: {names}"

    def has(self, quirk: str) -> bool:
        """Whether the options ask for a departure of the released code.

        Raises:
            KeyError: the method has no quirk of that name.
        """
        names = get_args(get_args(type(self).model_fields["quirks"].annotation)[0])
        if quirk not in names:
            raise KeyError(f"{quirk!r} is not one of the quirks {', '.join(names)}")
        released = names if self.released is None else self.released
        return quirk in self.quirks or (self.fidelity == "as_released" and quirk in released)


class RankingOptions(MethodOptions):
    """Of papers that give every channel a worth."""

    normalise: bool = select_only(
        True, description="select.scope global: each group's scores are divided by their mean before they are compared"
    )


class CoupledOptions(RankingOptions):
    """``combine``: how the layers of a coupled group become one score; each layer is divided by its mean first."""

    combine: Literal["leader", "sum", "mean"] = select_only("sum", description="how a group's layers become one score")
