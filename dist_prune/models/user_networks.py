"""Networks that a user's class or function makes: ``package.module:callable`` or ``./file.py:callable``.

Importing runs the user's code. A recipe is trusted as a script is. A bundle is not, so nothing here is reached from
one.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dist_prune import plugins
from dist_prune.errors import PruneError, nearest, shown


class UserNetwork:
    """A network made by a callable.

    The callable gets ``num_classes``, ``in_chans`` and ``pretrained`` as far as its signature takes them, and the
    recipe's ``backbone.kwargs``.

    Args:
        name: ``package.module:callable`` or ``./file.py:callable``.
    """

    def __init__(self, name: str):
        self.name = name
        self.place, _, self.attribute = name.rpartition(":")

    @property
    def file(self) -> Path | None:
        """The file, if the name is one of a file."""
        return Path(self.place).expanduser() if self.place.endswith(".py") else None

    def make(self) -> Callable[..., Any]:
        """Import the module and find the callable.

        Raises:
            PruneError: the module cannot be imported, or has no such callable.
        """
        found = plugins.import_object(self.name, "backbone.name")
        if not callable(found):
            raise PruneError(f"backbone.name: {self.name} is a {type(found).__name__}, not a class or a function")
        return found

    def check(self, kwargs: Mapping[str, Any]) -> None:
        taken = _parameters(self.make())
        if taken is not None:
            for key in kwargs:
                if key not in taken:
                    raise PruneError(
                        f"backbone.kwargs: {self.name} takes no argument {shown(key)}.{nearest(str(key), taken)} "
                        f"It takes {', '.join(sorted(taken)) or 'none'}"
                    )

    def build(self, classes: int, in_chans: int, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
        make = self.make()
        taken = _parameters(make)
        offered: dict[str, Any] = {"num_classes": classes, "in_chans": in_chans}
        if pretrained:
            if taken is not None and "pretrained" not in taken:
                raise PruneError(
                    f"backbone.pretrained: {self.name} takes no argument 'pretrained': name its weights with "
                    "backbone.checkpoint=FILE"
                )
            offered["pretrained"] = True
        arguments = {key: value for key, value in offered.items() if taken is None or key in taken} | dict(kwargs)
        try:
            model = make(**arguments)
        except TypeError as error:
            raise PruneError(f"backbone {self.name} could not be built with {arguments}: {error}") from error
        if not isinstance(model, nn.Module):
            raise PruneError(f"backbone.name: {self.name} made a {type(model).__name__}, not a torch.nn.Module")
        return model

    def pretrained_classes(self) -> int | None:
        return None

    def portable(self, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return self.name, dict(kwargs)

    def files(self) -> list[Path]:
        return [self.file] if self.file is not None else []


def _parameters(make: Callable[..., Any]) -> set[str] | None:
    """The names of a callable's arguments; None if it takes any."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}
