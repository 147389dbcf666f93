"""What a method asks for beside the weights, and what its scoring costs: declared, listed, and checked by a test."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """What the scoring of a method needs, with its default options.

    Attributes:
        images: whether it looks at calibration images. If False, it reads weights alone.
        labels: whether it uses the labels of the images.
        gradients: whether it takes gradients of the loss.
        training: whether it trains gates, masks or weights.
        forward: passes over the calibration images, or None if the number depends on the network or the options.
        backward: backward passes over them, or None likewise. A backward pass costs about two forward passes.
        note: what the cost grows with, if the numbers alone do not say it.
    """

    images: bool = True
    labels: bool = False
    gradients: bool = False
    training: bool = False
    forward: int | None = 1
    backward: int | None = 0
    note: str = ""

    @property
    def cost(self) -> str:
        """The cost in forward passes over the calibration images, as a column of a table."""
        if self.forward is None or self.backward is None:
            return self.note or "depends on the options"
        passes = f"{self.forward + 2 * self.backward}"
        return f"{passes} ({self.note})" if self.note else passes


WEIGHTS_ALONE = Needs(images=False, forward=0)
GRADIENTS = Needs(labels=True, gradients=True, forward=1, backward=1)
