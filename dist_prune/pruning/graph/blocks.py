"""Residual blocks as data: what goes if one is removed as a whole."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Block:
    """A residual block with a plain shortcut, x + f(x), that can go as a whole: the network then passes x on.

    Attributes:
        path: module path.
        layers: the layers of the graph that go with it.
        groups: names of the channel groups whose layers are all inside.
        other_params: number of its parameters that no layer counts.
        structure: what it has in common with blocks that it competes with: the kinds and kernels of its layers.
        protected: reason why it may not go; empty if it may.
    """

    path: str
    layers: tuple[str, ...]
    groups: tuple[str, ...]
    other_params: int
    structure: tuple[object, ...]
    protected: str = ""

    @property
    def key(self) -> str:
        """Its name among the groups in scores and in numbers of kept channels: 1 or absent is there, 0 is gone."""
        return block_key(self.path)

    def match(self, globs: Iterable[str]) -> str:
        """Return the first glob that matches the block or one of its layers; empty if none does."""
        names = (self.path, *self.layers)
        return next((glob for glob in globs if any(fnmatchcase(name, glob) for name in names)), "")


def block_key(path: str) -> str:
    """The name of a block, given its module path, among the names of groups."""
    return f"block:{path}"
