"""Features: a tower without labels keeps the features of the dense network; CKA and the classes of neighbours.

With the features f(x) of the dense network, the distance of a network's features g(x) is

    D(x) = sum over the outputs k of weight_k |phi(g_k(x)) - phi(f_k(x))|^2

where phi divides by the norm and by the square root of 2, so that D is 1 - cos (``distance: cosine``), or by the square
root of the number of channels, so that D is the mean squared error (``mse``); outputs with positions take the mean over
the positions. D is what finetuning lowers, and the figure ``loss``.

At the dense network D and its gradient are zero, so D itself ranks no channel. Its second-order expansion in the gates
z of the channels is (z - 1)^T J^T J (z - 1), with the Jacobian J of all weighted phi: removing channel i alone costs
|J_i|^2, the squared first-order change of the features. Criteria read gradients of one number, so the number is

    L(x) = <phi(f(x)), r(x)> + |phi(f(x)) - c|^2,   c = phi(f(x)) as a constant

with independent signs r that follow from the sample id. The gradient is r^T J, since the second term has none at c, and
E (r^T J)_i^2 = |J_i|^2: squared gradients (taylor, fisher, obd) estimate the distance. The Hessian is 2 J^T J plus a
term whose mean over r is zero: criteria of second order (obd with hutchinson, hessian_trace) read the Hessian of D.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dist_prune.errors import PruneError, unknown
from dist_prune.tasks.base import Batch, Task, TaskOptions, Training
from dist_prune.tasks.outputs import named_tensors, shape_text
from dist_prune.tasks.similarity import linear_cka, neighbour_classes
from dist_prune.tasks.tallies import count_losses, mean_of_counted

SINGLE = {2: "pooled", 3: "patches", 4: "patches"}  # axes of a network's only output -> its name
MIX = 0x9E3779B97F4A7C15  # odd: sample ids become distant seeds


class Options(TaskOptions):
    """Options of features.

    Attributes:
        distance: of two features.
        weights: output -> its weight.
        neighbours: images that vote for a class.
        gallery: training images that the neighbours are among.
    """

    distance: Literal["cosine", "mse"] = Field(
        default="cosine", description="distance of two features: 1 - cosine, or the mean squared error of the channels"
    )
    weights: dict[str, Annotated[float, Field(ge=0, le=10**6)]] = Field(
        default_factory=dict, description="output (pooled, patches) -> its weight in the distance; default: 1 for each"
    )
    neighbours: int = Field(default=20, ge=1, le=10**4, description="number of neighbours that vote for a class (k-NN)")
    gallery: int = Field(
        default=10_000, ge=0, le=10**7, description="number of training images that neighbours are among; 0: no k-NN"
    )


class Features(Task):
    """The features of images. No label is learned from; where images have classes, k-NN shows what features are worth.

    The network gives one tensor (images, channels), (images, tokens, channels) or (images, channels, h, w), or several.
    """

    name = "features"
    Options = Options
    targets = "anything"
    titles = {"cka": "CKA", "knn": "k-NN top-1 %"}
    primary = "cka"
    compares = True
    any_size = True

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The number whose gradient ranks channels (see the top of this file), (n,)."""
        values = self._embedded(outputs)
        fixed = values.detach()
        return (values * _signs(batch.ids, values)).sum(1) + (values - fixed).square().sum(1)

    def training_loss(self, outputs: Any, batch: Batch, settings: Training) -> Tensor:
        """Zeros: all that is learned is the distance to the dense network (``distil``)."""
        return self._embedded(outputs).new_zeros(len(batch.images))

    def distil(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """The distance D of the features, (n,); the temperature is for logits and not read."""
        return (self._embedded(outputs) - self._embedded(teacher)).square().sum(1)

    def tally(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        return {"loss": count_losses(self.distil(outputs, batch.reference, 1.0))}

    def tally_shapes(self, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"loss": (2,)}

    def rows(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """One vector of each image, its class (0 where images have none), and the dense network's vector."""
        labels = batch.labels if batch.labels.dim() == 1 else torch.zeros(len(batch.images))
        rows = {"found": _pooled(outputs), "labels": labels}
        return rows if batch.reference is None else {**rows, "dense": _pooled(batch.reference)}

    def row_shapes(self, outputs: int) -> None:
        """As ``rows`` gives them: the number of channels is the network's."""
        return

    def gallery_images(self, kind: str) -> int:
        return self.options.gallery if kind == "classes" else 0

    def left_out(self, kind: str) -> str:
        """Why there is no k-NN, as a sentence; empty if there is."""
        if self.gallery_images(kind):
            return ""
        why = "task.gallery is 0" if kind == "classes" else "the images have no classes"
        return f"k-NN top-1 is left out: {why}"

    def figures(self, tables: Mapping[str, Tensor], images: int) -> dict[str, float]:
        """Figures of the vectors of all images.

        Returns:
            ``cka``: likeness to the dense network's vectors, 0 to 1. ``knn``: share of the images in percent whose
            neighbours in the gallery vote for their class; missing without a gallery. ``loss``: mean distance D.
        """
        figures = {
            "cka": linear_cka(tables["found"], tables["dense"]),
            "loss": mean_of_counted(tables["loss"], images),
        }
        if "gallery_found" in tables:
            classes = tables["gallery_labels"].long()
            votes = neighbour_classes(tables["found"], tables["gallery_found"], classes, self.options.neighbours)
            figures["knn"] = 100 * int((votes == tables["labels"].long()).sum()) / images
        return figures

    def check_outputs(self, outputs: Any, count: int, images: Tensor) -> str:
        tensors = _named(outputs)
        wrong = [name for name, t in tensors.items() if t.dim() not in SINGLE or len(t) != len(images)]
        if not tensors or wrong:
            return (
                f"gives {shape_text(outputs)}, for two images; features are (images, channels), (images, tokens, "
                "channels) or (images, channels, h, w), one tensor or several. features:NAME is a network of timm "
                "without its head"
            )
        for name in self.options.weights:
            if name not in tensors:
                raise PruneError(f"task.weights: {unknown('output', name, list(tensors))}")
        if not self._weighted(tensors):
            raise PruneError("task.weights: every output has the weight 0, so there is no distance")
        return ""

    def check_training(self, settings: Training, section: str) -> None:
        super().check_training(settings, section)
        if section == "train":
            raise PruneError(
                "train.epochs: the task features has no labels to train a dense network from. Name its weights "
                "(backbone.checkpoint=FILE or backbone.pretrained=true), and set train.epochs=0"
            )
        if settings.distill != 1:
            raise PruneError(
                f"{section}.distill: the task features learns from the dense network's features alone, and "
                f"{section}.distill is {settings.distill:g}. Write {section}.distill=1"
            )

    def _weighted(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        weights = self.options.weights or dict.fromkeys(tensors, 1.0)
        return {name: weight for name, weight in weights.items() if weight}

    def _embedded(self, outputs: Any) -> Tensor:
        """(n, values): the weighted phi of all outputs side by side; squared distances of these rows are D."""
        tensors, parts = _named(outputs), []
        for name, weight in self._weighted(tensors).items():
            values, axis = tensors[name], -1 if tensors[name].dim() == 3 else 1
            channels = values.shape[axis]
            positions = values[0].numel() // channels
            if self.options.distance == "cosine":
                values = functional.normalize(values, dim=axis) * (weight / (2 * positions)) ** 0.5
            else:
                values = values * (weight / (channels * positions)) ** 0.5
            parts.append(values.flatten(1))
        return torch.cat(parts, 1)


def _named(outputs: Any) -> dict[str, Tensor]:
    """Name -> tensor of the outputs of real numbers; a single tensor is named by its form."""
    if isinstance(outputs, Tensor):
        return {SINGLE.get(outputs.dim(), "features"): outputs}
    return {name: tensor for name, tensor in named_tensors(outputs, "features") if tensor.is_floating_point()}


def _pooled(outputs: Any) -> Tensor:
    """(n, channels): the first output without positions, else the mean over the positions of the last output."""
    tensors = list(_named(outputs).values())
    plain = next((tensor for tensor in tensors if tensor.dim() == 2), None)
    if plain is not None:
        return plain
    return tensors[-1].mean(1) if tensors[-1].dim() == 3 else tensors[-1].mean((2, 3))


def _signs(ids: Tensor, values: Tensor) -> Tensor:
    """Random signs of each image, of the form of ``values``: the same for an id on every rank and in every batch."""
    rows = []
    for number in ids.tolist():
        generator = torch.Generator().manual_seed((number + 1) * MIX % 2**63)
        rows.append(torch.randint(0, 2, (values.shape[1],), dtype=torch.int8, generator=generator))
    return (2 * torch.stack(rows).to(values.device) - 1).to(values.dtype)
