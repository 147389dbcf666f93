"""The pruned network that a run starts from if ``backbone.bundle`` names one, perhaps with another head."""

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_prune import models
from dist_prune.config.data import Backbone
from dist_prune.errors import PruneError, abbreviate, shown
from dist_prune.export import bundle
from dist_prune.fileio import canonical
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.after_pruning import graph_after
from dist_prune.pruning.plan.plan import Plan


@dataclass
class StartNetwork:
    """The network of the bundle that ``backbone.bundle`` names.

    Attributes:
        spec: The recipe's section ``backbone``; its ``bundle`` is set.
        seed: Draws the weights of a new head.
    """

    spec: Backbone
    seed: int = 0

    @cached_property
    def bundle(self) -> bundle.Bundle:
        """The content of the bundle's files.

        Raises:
            PruneError: There is no such bundle, its backbone is not the recipe's, or it masks single weights.
        """
        path = Path(str(self.spec.bundle)).expanduser()
        found = bundle.read_bundle(path)
        backbone = found.body["backbone"]
        for key, value in (("name", self.spec.name), ("kwargs", self.spec.kwargs)):
            if value != backbone[key]:
                right = canonical(backbone[key]) if key == "kwargs" else backbone[key]
                raise PruneError(
                    f"backbone.bundle: {path} holds a network of backbone.{key} {shown(backbone[key])}, the recipe "
                    f"says {shown(value)}. Write backbone.{key}={right}"
                )
        if found.plan.blocks:
            raise PruneError(
                f"backbone.bundle: {path} masks single weights, which another training would fill. Name a bundle whose "
                "channels were removed"
            )
        return found

    @property
    def plan(self) -> Plan:
        """What was removed before, in dense coordinates."""
        return self.bundle.plan

    def plan_on(self, graph: DependencyGraph) -> Plan:
        """The plan of what was removed before, with the width of the head that the data need.

        Args:
            graph: Of the dense network with the classes of the data.

        Raises:
            PruneError: The plan removes channels of groups that the network has not.
        """
        widths = {group.name: group.width for group in graph.groups}
        old = self.plan
        wrong = [name for name in old.removed if old.widths[name] != widths.get(name)]
        if wrong:
            raise PruneError(
                f"backbone.bundle: its plan removes channels of {abbreviate(wrong, 4)}, and this recipe finds no such "
                "groups in the network. Write backbone.units and backbone.streams as in the run that made the bundle; "
                "if they are the same, load the bundle with the version that made it"
            )
        return Plan(
            old.removed,
            widths,
            {name: why for name, why in old.reasons.items() if name in widths},
            blocks_removed=old.blocks_removed,
        )

    def graph_of(self, dense: DependencyGraph) -> DependencyGraph:
        """The dependency graph of the pruned network, whose own costs are the whole that targets are shares of.

        Args:
            dense: Of the dense network with the classes of the data.
        """
        graph = graph_after(dense, self.plan_on(dense))
        return replace(graph, groups=tuple(replace(group, gone=0) for group in graph.groups), origin=None)

    def mismatch(self, classes: Sequence[str]) -> str:
        """Say why the bundle's head cannot serve the classes of the data.

        Args:
            classes: Class names of the data, in the order of their numbers.

        Returns:
            A clause, or an empty text if the head fits. Bundles whose classes are bare numbers are compared by count.
        """
        own = self.bundle.body["classes"]
        if len(own) != len(classes):
            return f"that of the bundle has {len(own)} classes"
        if list(own) == list(classes) or own == list(map(str, range(len(own)))):
            return ""
        if sorted(own) == sorted(classes):
            return f"that of the bundle numbers the same classes in another order: {abbreviate(own, 4)}"
        return f"that of the bundle knows other classes: {abbreviate(own, 4)}"

    def create(self, classes: Sequence[str], in_channels: int) -> nn.Module:
        """Create the network with the bundle's weights; a head that does not fit the classes is drawn from the seed.

        Args:
            classes: Class names of the data.
            in_channels: Channels of its images.

        Raises:
            PruneError: The images have another number of channels, or the head is no linear layer.
        """
        wanted = self.bundle.body["backbone"]["in_chans"]
        if wanted != in_channels:
            raise PruneError(
                f"backbone.bundle: its network takes {wanted} channel(s), the images of the data have {in_channels}"
            )
        model = copy.deepcopy(self._small)
        if self.mismatch(classes):
            _replace_head(model, len(classes), self.seed)
        return model

    @cached_property
    def _small(self) -> nn.Module:
        return self.bundle.small().train()

    def create_dense(self, classes: int, in_channels: int, pretrained: bool = False) -> nn.Module:
        """Create the dense network that the bundle's was cut from, with arbitrary weights or timm's."""
        return models.create(self.spec.name, classes, in_channels, pretrained, self.spec.kwargs)

    def image_config(self) -> dict[str, Any]:
        """The preparation of images that the network was trained with, as ``models.image_config`` names it."""
        image = self.bundle.body["image"]
        config = {"mean": tuple(image["mean"]), "std": tuple(image["std"])}
        names = {"crop": "crop_pct", "interpolation": "interpolation", "crop_mode": "crop_mode"}
        config |= {name: image[key] for key, name in names.items() if key in image}
        return config | {"input_size": self.bundle.shape}

    def origin(self) -> dict[str, Any]:
        """Provenance for the bundle that a run makes from this one."""
        body = self.bundle.body
        return {
            "weights_digest": body["weights_digest"],
            "plan": self.plan.fingerprint,
            "origin": body.get("origin") or {},
            "figures": {name: dict(figures) for name, figures in (body.get("figures") or {}).items()},
        }

    def digest(self) -> str:
        """The sha256 in hexadecimal of everything in the bundle that decides a run."""
        body = self.bundle.body
        parts = {key: body[key] for key in ("backbone", "plan", "image", "classes", "weights_digest")}
        return hashlib.sha256(canonical(parts).encode()).hexdigest()


def _replace_head(model: nn.Module, classes: int, seed: int) -> None:
    """Replace the classifier of a network by one of ``classes`` outputs, drawn from the seed, in place."""
    get_classifier = getattr(model, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else None
    heads = [name for name, module in model.named_modules() if module is found and isinstance(module, nn.Linear)]
    if len(heads) != 1:
        raise PruneError(
            f"backbone.bundle: the head of {type(model).__name__} is no single linear layer, so no other can take its "
            "place. Use images of the bundle's classes"
        )
    parent, _, leaf = heads[0].rpartition(".")
    old = model.get_submodule(heads[0])
    assert isinstance(old, nn.Linear)
    head = nn.Linear(old.in_features, classes, old.bias is not None)
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(old.in_features)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    setattr(model.get_submodule(parent), leaf, head)


def matching_keys(body: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe keys ``backbone.name`` and ``backbone.kwargs`` of a bundle's network."""
    return {"name": body["backbone"]["name"], "kwargs": body["backbone"]["kwargs"]}
