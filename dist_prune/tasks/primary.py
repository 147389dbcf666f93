"""The figure that a task is judged by, as tables and pages say it: its name, its unit and its direction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PrimaryFigure:
    """The primary figure of a task; made from a report, so the task need not be installed.

    Attributes:
        task: name of the task.
        key: name of the figure in reports.
        title: head of its column, with its unit.
        higher_is_better: its direction.
    """

    task: str
    key: str
    title: str
    higher_is_better: bool = True

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> "PrimaryFigure":
        """The primary figure of a task's description (``Task.description``)."""
        key = str(description["primary"])
        higher = bool(description.get("higher_is_better", True))
        return cls(str(description["name"]), key, str(description["titles"][key]), higher)

    @property
    def name(self) -> str:
        """The figure in words, without its unit."""
        return self.title.removesuffix(" %")

    @property
    def percent(self) -> bool:
        """Whether its unit is percent; differences are points then, and else of the figure's own unit."""
        return self.title.endswith(" %")

    @property
    def axis_title(self) -> str:
        """The title with its direction, where that is not the usual one."""
        return self.title if self.higher_is_better else f"{self.title} (lower is better)"

    @property
    def change_title(self) -> str:
        """Head of a column of differences."""
        return "change, points" if self.percent else "change"

    def number(self, value: float) -> str:
        """A value without its unit."""
        return f"{value:.2f}" if self.percent else f"{value:.4g}"

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.2f} %" if self.percent else f"{value:.4g}"

    def signed(self, change: float) -> str:
        """A difference with its sign, without its unit."""
        return f"{change:+.2f}" if self.percent else f"{change:+.4g}"

    def points(self, size: float) -> str:
        """The size of a difference, as a person gives it: ``1 point(s) of top-1``, ``0.1 of RMSE``."""
        return f"{size:g} point(s) of {self.name}" if self.percent else f"{size:g} of {self.name}"

    def lost(self, dense: float, value: float) -> float:
        """How much worse a value is than that of the dense network; negative where it is better."""
        return dense - value if self.higher_is_better else value - dense
