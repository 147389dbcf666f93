"""Classes by name: one file or folder of a package for each, whose name is the class's, and those of entry points."""

import importlib
import pkgutil
from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from dist_prune import plugins
from dist_prune.errors import PruneError

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The classes of one kind.

    Attributes:
        kind: of their entry points.
        package: dotted name of the package that holds their files.
        base: their base class.
        shared: modules of the package that hold no class of their own.
        public: dotted name of the base class, for errors.
    """

    kind: plugins.Kind
    package: str
    base: type[T]
    shared: Collection[str]
    public: str

    def own_names(self) -> list[str]:
        """The names of this package's own classes."""
        path = importlib.import_module(self.package).__path__
        return [module.name for module in pkgutil.iter_modules(path) if module.name not in self.shared]

    def list_names(self) -> list[str]:
        """The names of all classes, sorted: those of this package, and those of other packages' entry points."""
        return sorted({*self.own_names(), *plugins.names(self.kind)})

    def find(self, name: str) -> type[T]:
        """Import the class of a name.

        Args:
            name: one of ``list_names``.

        Raises:
            PruneError: several packages have the name, another package's cannot be imported or is no subclass of
                ``base``, or a file of this package does not hold exactly one.
        """
        folder = self.package.replace(".", "/")
        plugin = plugins.find(self.kind, name, f"{folder}/{name}" if name in self.own_names() else "")
        if plugin is not None:
            loaded = plugins.load(plugin)
            if not (isinstance(loaded, type) and issubclass(loaded, self.base)):
                raise PruneError(f"{plugin} is no subclass of {self.public}")
            return loaded
        module = importlib.import_module(f"{self.package}.{name}")
        classes = [
            c
            for c in vars(module).values()
            if isinstance(c, type) and issubclass(c, self.base) and f"{c.__module__}.".startswith(f"{module.__name__}.")
        ]
        if len(classes) != 1:
            file = f"{name}/__init__.py must export" if hasattr(module, "__path__") else f"{name}.py must hold"
            where = self.package.rpartition(".")[2]
            raise PruneError(f"{where}/{file} exactly one {self.base.__name__} class, it has {len(classes)}")
        return classes[0]
