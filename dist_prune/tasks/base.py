"""The contract between a task and the harness: ``Task``, what is learned and measured.

A task is one file beside this one, or a class of another package (entry-point group ``dist_prune.tasks``). It knows
outputs and targets. It knows no channel, no rank and no loader.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dist_prune.config.training import Training
from dist_prune.data.loader import Batch
from dist_prune.errors import PruneError
from dist_prune.tasks.outputs import main_output, map_tensors

__all__ = ["Batch", "Picture", "Task", "TaskOptions", "Training"]

Targets = Literal["classes", "masks", "boxes", "labels", "values", "anything"]
Need = Literal["class labels", "class logits"]

# What a method may need -> the sentence that follows "needs" in the refusal.
NEEDS: dict[str, str] = {
    "class labels": "one class number for each image",
    "class logits": "logits of classes for each image, (images, classes)",
}


class TaskOptions(BaseModel):
    """The base model of a task's options, the keys of a recipe's ``task`` section beside ``name``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Picture:
    """One image for the report.

    Attributes:
        caption: what it shows.
        pixels: (H, W, 3) uint8.
    """

    caption: str
    pixels: np.ndarray


class Task(ABC):
    """What a network learns and how it is measured.

    Tables merge by sum, so figures do not depend on the number of ranks: ``tally`` gives integers. What cannot be
    counted (a ranking over all images) is given by ``rows``: one row for each image, addressed by its position.

    Attributes:
        name: of the task, as in a recipe.
        Options: pydantic model of its recipe keys (section ``task``).
        targets: what a data set has to give for each image. ``classes``: one class number. ``masks``: a class number
            for each pixel. ``boxes``: boxes with a class each. ``labels``: 0 or 1 for each class. ``values``: numbers.
            ``anything``: nothing is learned from it.
        titles: name of a figure -> head of its row in tables, with its unit. The order is that of the tables. A figure
            that ``figures`` leaves out has no row.
        primary: the figure that selects epochs and that pruning is judged by.
        higher_is_better: its direction.
        provides: what methods may ask for (keys of ``NEEDS``).
        mixes: whether mixup and CutMix can mix the targets.
        gathers_targets: whether ``figures`` needs the targets of every image, as the row ``targets``.
        any_size: whether a network serves images of other sizes than it was measured at: exported files take them,
            where the network does.
        compares: whether ``tally`` and ``rows`` read the dense network's outputs (``Batch.reference``).
        answer_names: the names that ``answers`` gives, which a run keeps for each test image.
        kept_tables: the names of tables of ``tally`` that a run keeps beside its figures.
    """

    name: ClassVar[str]
    Options: ClassVar[type[TaskOptions]] = TaskOptions
    targets: ClassVar[Targets]
    titles: ClassVar[Mapping[str, str]]
    primary: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    provides: ClassVar[frozenset[str]] = frozenset()
    mixes: ClassVar[bool] = False
    gathers_targets: ClassVar[bool] = False
    any_size: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    answer_names: ClassVar[tuple[str, ...]] = ()
    kept_tables: ClassVar[tuple[str, ...]] = ()

    options: Any

    def __init__(self, options: Any = None):
        """Keep the options.

        Args:
            options: an instance of ``Options``; None: its defaults.
        """
        self.options = self.Options() if options is None else options

    def forward(self, network: Callable[..., Any], batch: Batch) -> Any:
        """Run a network on a batch.

        Args:
            network: the network, perhaps wrapped for the ranks.
            batch: images, targets and ids.

        Returns:
            The network's outputs of any form.
        """
        return network(batch.images)

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Compute the loss of each image.

        Args:
            outputs: of the network, in training or evaluation mode.
            batch: n images with their targets.

        Returns:
            (n,) of the outputs' dtype. The loss of an image does not depend on the other images.
        """

    def training_loss(self, outputs: Any, batch: Batch, settings: Training) -> Tensor:
        """Compute the loss of each image in training, (n,). The default is ``loss``.

        Args:
            outputs: of the network in training mode, float32 or float64.
            batch: n images with their targets.
            settings: the recipe's section of the training, which ``check_training`` has seen.
        """
        return self.loss(outputs, batch)

    def hits(self, outputs: Any, targets: Tensor) -> Tensor | None:
        """Count the images that the network gets right, () int64, for the log of a training; None: nothing to count."""
        return None

    @abstractmethod
    def tally(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Count what the figures need.

        Args:
            outputs: of the network in evaluation mode, float32 or float64.
            batch: n images with their targets.

        Returns:
            Name -> int64 table on the device, of the shape that ``tally_shapes`` says. Tables of batches are added.
        """

    @abstractmethod
    def tally_shapes(self, outputs: int) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the tables.

        Args:
            outputs: number of classes or of values.
        """

    def rows(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """What the figures need of each image alone: name -> (n, ...) float64. The default is nothing."""
        return {}

    def row_shapes(self, outputs: int) -> dict[str, tuple[int, ...]] | None:
        """The names and shapes of ``rows``, without the first axis; None: as ``rows`` gives them for one image."""
        return {}

    def answers(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """What the network answers for each image, for the pages of a run. The default is nothing.

        Args:
            outputs: of the network in evaluation mode, float32 or float64.
            batch: n images with their targets.

        Returns:
            The names of ``answer_names``: (n,) int64, at least 0, on the device.
        """
        return {}

    def gallery_images(self, kind: str) -> int:
        """The number of training images whose rows ``figures`` gets too, under ``gallery_<name>``; the default is 0.

        Args:
            kind: what the images have, a key of ``data.random_access.TARGETS``.
        """
        return 0

    def left_out(self, kind: str) -> str:
        """A sentence on the figures that images of this kind do not have; empty: they have all.

        Args:
            kind: what the images have, a key of ``data.random_access.TARGETS``.
        """
        return ""

    @abstractmethod
    def figures(self, tables: Mapping[str, Tensor], images: int) -> dict[str, float]:
        """Compute the figures from merged tables. Pure.

        Args:
            tables: sums over all images, int64, and rows of all images, (images, ...) float64 by ascending id; on the
                CPU.
            images: number of images.

        Returns:
            The names of ``titles``, ``primary`` among them, and ``loss``.
        """

    def distil(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Compute the distance of a network's outputs to those of the dense network.

        Args:
            outputs: of the network that is trained, float32 or float64.
            teacher: of the dense network in evaluation mode, of the same dtype, without gradient.
            temperature: the recipe's ``distill_temperature``.

        Returns:
            (n,) distances.
        """
        raise PruneError(f"finetune.distill: the task {self.name} has no distillation loss; set it to 0")

    def protect(self, layers: Sequence[str]) -> dict[str, str]:
        """The layers whose channels stay, because they mean something outside the network.

        Args:
            layers: module paths of all producers.

        Returns:
            Module path -> reason. Channels that are the network's outputs are protected anyway.
        """
        return {}

    @abstractmethod
    def check_outputs(self, outputs: Any, count: int, images: Tensor) -> str:
        """Check a network's outputs.

        Args:
            outputs: of two images, in training or evaluation mode.
            count: number of classes or of values.
            images: (2, C, H, W).

        Returns:
            What is wrong with them, as the end of a sentence; empty if nothing is.
        """

    def count_outputs(self, outputs: Any) -> int:
        """The number of classes or values of a network's outputs; 0 if they do not tell."""
        main = main_output(outputs)
        return main.shape[1] if isinstance(main, Tensor) and main.dim() > 1 else 0

    def check_training(self, settings: Training, section: str) -> None:
        """Check that the task can do what a training asks for.

        Args:
            settings: the recipe's section of the training.
            section: its name.

        Raises:
            PruneError: it cannot; names the key.
        """
        for key in () if self.mixes else ("mixup", "cutmix", "label_smoothing"):
            if getattr(settings, key):
                raise PruneError(
                    f"{section}.{key}: the task {self.name} cannot mix or smooth its targets; leave the key out"
                )
        if settings.distill and type(self).distil is Task.distil:
            raise PruneError(f"{section}.distill: the task {self.name} has no distillation loss; set it to 0")

    def check_method(self, method: str, needs: Sequence[str]) -> None:
        """Check that a method makes sense for this task.

        Args:
            method: its name.
            needs: what it asks for, keys of ``NEEDS``.

        Raises:
            PruneError: the task does not have it.
        """
        missing = [need for need in needs if need not in self.provides]
        if missing:
            raise PruneError(
                f"method.name: {method} needs {' and '.join(NEEDS[need] for need in missing)}; the task {self.name} "
                "has none. Methods that read weights, activations or the gradient of the loss work with every task: "
                "l1, fpgm, bn_scale, chip, hrank, taylor, fisher, obd and others"
            )

    def pictures(self, batch: Batch, images: np.ndarray, outputs: Mapping[str, Any]) -> list[list[Picture]]:
        """Pictures for the report.

        Args:
            batch: a few images with their targets.
            images: the same images as they are seen, (n, H, W, 3) uint8.
            outputs: network (``dense``, ``pruned``, perhaps ``repaired``, ``finetuned``) -> its outputs.

        Returns:
            A row of pictures for each image; empty: no pictures.
        """
        return []

    def legend(self, classes: Sequence[str]) -> list[tuple[str, str]]:
        """What the colours of ``pictures`` mean: (name, colour as ``#rrggbb``); empty: nothing to explain.

        Args:
            classes: names of the classes or values.
        """
        return []

    def better(self, value: float, than: float | None) -> bool:
        """Whether a primary figure is better than another one; anything but nan is better than None."""
        if than is None:
            return value == value
        return value > than if self.higher_is_better else value < than

    @property
    def figure_name(self) -> str:
        """The primary figure in words, without its unit: ``top-1``."""
        return self.titles[self.primary].removesuffix(" %")

    def text(self, value: float) -> str:
        """A value of the primary figure in words: ``top-1 91.50 %``."""
        percent = self.titles[self.primary].endswith(" %")
        return f"{self.figure_name} {value:.2f} %" if percent else f"{self.figure_name} {value:.4g}"

    @property
    def is_classification(self) -> bool:
        """Whether each image has one class number and the network gives logits of classes."""
        return {"class labels", "class logits"} <= self.provides

    def description(self) -> dict[str, Any]:
        """What a report says about the task, so that it can be read where the task is not installed."""
        return {
            "name": self.name,
            **self.options.model_dump(mode="json"),
            "titles": dict(self.titles),
            "primary": self.primary,
            "higher_is_better": self.higher_is_better,
            **({"any_size": True} if self.any_size else {}),
        }


def in_float(outputs: Any) -> Any:
    """Outputs of a network in float32, or float64 where they are that already."""
    return map_tensors(lambda t: t.float() if t.is_floating_point() and t.dtype != torch.float64 else t, outputs)
