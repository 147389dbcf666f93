"""The figures of the networks of a run, on its test images or on training images that are held out."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from dist_prune.data.loader import ImageLoader
from dist_prune.data.random_access import target_kind
from dist_prune.data.sampling import calibration_ids
from dist_prune.pipeline.context import RunContext
from dist_prune.training.evaluation import Gallery, evaluate


@dataclass
class Measure:
    """Measures figures of the run's task. All ranks make and call it alike.

    Attributes:
        context: The run.
        selects: Whether the figures select an epoch: images are not compared with a gallery then.
    """

    context: RunContext
    selects: bool = False

    def __call__(
        self,
        network: nn.Module,
        what: str,
        ids: np.ndarray | None = None,
        loader: ImageLoader | None = None,
        kept: dict[str, Tensor] | None = None,
    ) -> dict[str, float]:
        """The figures of one network.

        Args:
            network: On the run's device; left in evaluation mode.
            what: Name of the images or of the network, for the progress bar and errors.
            ids: (n,) int64 ids of the images; None: all of the loader.
            loader: Of the images; None: the test images.
            kept: Takes the answers and tables that a run keeps (see ``evaluate``), if given.
        """
        context = self.context
        return evaluate(
            network,
            context.images.loader(False) if loader is None else loader,
            context.recipe.evaluate.batch,
            context.environment.comm,
            context.tracker,
            what,
            ids,
            context.task,
            self._dense,
            None if self.selects or loader is not None else self._gallery,
            kept,
        )

    @cached_property
    def _dense(self) -> nn.Module | None:
        """The dense network on the run's device, where the task compares with it."""
        if not self.context.task.compares:
            return None
        return self.context.networks.load_dense().to(self.context.environment.device)

    @cached_property
    def _gallery(self) -> Gallery | None:
        """The training images that the task compares test images with; None without any."""
        loader = self.context.images.loader(True)
        count = self.context.task.gallery_images(target_kind(loader.source))
        ids = calibration_ids(loader.source.labels, count, self.context.recipe.seed)
        return Gallery(loader, ids) if count else None
