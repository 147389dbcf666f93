"""The networks of a run, created or loaded from its artifacts; its dependency graph; the plans of its rounds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from dist_prune import models
from dist_prune.config.recipe import Recipe
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.methods.base import Method
from dist_prune.models.load_checkpoint import load_checkpoint
from dist_prune.pipeline.images import RunImages
from dist_prune.pipeline.stage_graph import DENSE, FINETUNED, round_path
from dist_prune.pipeline.start_network import StartNetwork
from dist_prune.pruning.graph.called_layers import call_layers
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan import files
from dist_prune.pruning.plan.after_pruning import graph_after
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.tasks import build as build_task


def check_teacher(recipe: Recipe) -> None:
    """PruneError if a finetuning of a bundle distils, and nothing names the weights of the dense network."""
    spec = recipe.backbone
    if spec.bundle and recipe.finetune.distill and not spec.checkpoint and not spec.pretrained:
        raise PruneError(
            "finetune.distill: the bundle holds no dense network to learn from. Name its weights with "
            "backbone.checkpoint=FILE or backbone.pretrained=true, or write finetune.distill=0"
        )


@dataclass
class RunNetworks:
    """Dense, pruned and finetuned networks of one run. Rounds are counted from 1; plans are in dense coordinates.

    Attributes:
        recipe: The validated recipe.
        method: The recipe's method, which restricts the graph to the groups that it can prune.
        images: The images of the run, which decide the numbers of classes and input channels and the input's size.
        path: Maps the name of an artifact to its file.
    """

    recipe: Recipe
    method: Method
    images: RunImages
    path: Callable[[str], Path]

    @cached_property
    def start(self) -> StartNetwork | None:
        """The pruned network that the run starts from (``backbone.bundle``) in the dense one's place, or None."""
        backbone = self.recipe.backbone
        return StartNetwork(backbone, self.recipe.seed) if backbone.bundle else None

    @property
    def checkpoint(self) -> Path | None:
        """The recipe's checkpoint file of the dense network, which may be missing; None if it names none."""
        file = self.recipe.backbone.checkpoint
        return Path(file).expanduser() if file else None

    def create(self, pretrained: bool = False) -> nn.Module:
        """Create the dense backbone, to be filled or traced.

        Args:
            pretrained: Whether it gets timm's pretrained weights; otherwise its weights are arbitrary.
        """
        backbone, images = self.recipe.backbone, self.images
        if self.start is not None:
            model = self.start.create(images.classes, images.in_channels)
        else:
            classes = len(images.classes)
            model = models.create(backbone.name, classes, images.in_channels, pretrained, backbone.kwargs)
        call_layers(model, backbone.units)
        return model

    def create_initial(self) -> nn.Module:
        """Create the dense backbone that training starts from.

        Its weights are drawn from the recipe's seed; or they are timm's, if ``backbone.pretrained`` is set and
        ``backbone.checkpoint`` is not.
        """
        torch.manual_seed(self.recipe.seed)
        return self.create(self.recipe.backbone.pretrained and not self.recipe.backbone.checkpoint)

    def load_dense(self) -> nn.Module:
        """The backbone with the dense weights of this run (dense.safetensors)."""
        model = self.create()
        model.load_state_dict(tensor_files.read_tensors(self.path(DENSE))[0])
        return model

    def load_teacher(self) -> nn.Module:
        """The network whose outputs a distillation follows: the dense one, or of a bundle the one that it was cut from.

        Raises:
            PruneError: The dense network's weights of a bundle are neither a file nor timm's.
        """
        if self.start is None:
            return self.load_dense()
        spec, classes = self.recipe.backbone, len(self.images.classes)
        check_teacher(self.recipe)
        fetched = spec.pretrained and self.checkpoint is None
        dense = self.start.create_dense(classes, self.images.in_channels, fetched)
        if self.checkpoint is not None:
            load_checkpoint(dense, self.checkpoint, spec, classes, False, lambda text: None)
        return dense

    def load_pruned(self, name: str, number: int) -> nn.Module:
        """The network after a round.

        Args:
            name: Artifact that contains the weights.
            number: The round, counted from 1; its plan is done.
        """
        return rebuild(self.create(), self.plan(number), tensor_files.read_tensors(self.path(name))[0])

    def load_round_input(self, number: int) -> nn.Module:
        """The network that round ``number`` scores and prunes: dense, or the finetuned one of the previous round."""
        if number == 1:
            return self.load_dense()
        return self.load_pruned(round_path(number - 1, FINETUNED), number - 1)

    @cached_property
    def graph(self) -> DependencyGraph:
        """The dependency graph of the dense backbone: the layers and groups that the method can prune."""
        if self.start is None:
            graph = self._trace(self.create())
        else:
            graph = self.start.graph_of(self._graph_before_start)
        return self.method.prunable(graph.protect_producers(build_task(self.recipe.task).protect(graph.producers)))

    @cached_property
    def _graph_before_start(self) -> DependencyGraph:
        """The dependency graph of the dense network that a bundle's was cut from."""
        assert self.start is not None
        dense = self.start.create_dense(len(self.images.classes), self.images.in_channels)
        return self._trace(dense)

    def _trace(self, dense: nn.Module) -> DependencyGraph:
        spec = self.recipe.backbone
        before = self.start.plan.blocks_removed if self.start is not None else ()
        depth = bool(self.recipe.select.depth or before)
        return trace_groups(dense.eval(), self.images.example_input, spec.protect, spec.streams, spec.units, depth)

    def whole_plan(self, number: int) -> Plan:
        """What rounds 1 to ``number`` remove, and what was removed before the run if it starts from a bundle."""
        plan = self.plan(number)
        return plan if self.start is None else self.start.plan_on(self._graph_before_start).then(plan)

    def round_graph(self, graph: DependencyGraph, number: int) -> DependencyGraph:
        """The dependency graph of the network that a round starts from.

        Args:
            graph: A dependency graph of the dense network.
            number: The round, counted from 1.
        """
        return graph if number == 1 else graph_after(graph, self.plan(number - 1))

    def plan(self, number: int) -> Plan:
        """The plan of everything that rounds 1 to ``number`` remove, in dense coordinates."""
        return Plan.from_json(self.path(round_path(number, "plan.json")).read_text())

    def replayed_plan(self, selection: SelectionRequest, say: Callable[[str], None] = lambda text: None) -> Plan:
        """The plan that ``select.plan`` names.

        Args:
            selection: The selection that the recipe requests otherwise, which has to be empty.
            say: Called with a line if layers of pruning information were matched under other names.

        Raises:
            PruneError: Another key requests a selection as well, or the plan is missing or does not fit the network.
        """
        section, bundle = self.recipe.select, self.recipe.backbone.bundle
        values = {
            "select.threshold": selection.threshold, "select.keep_ratio": selection.keep_ratio,
            "select.counts": selection.counts, "target": selection.target,
            "select.exclude": section.exclude, "select.round_to": section.round_to > 1,
            "select.min_channels": section.min_channels > 1, "select.include": section.include,
            "select.keep_ratios": section.keep_ratios, "select.max_ratio": section.max_ratio,
        }  # fmt: skip
        conflicting = [key for key, value in values.items() if value not in (None, (), False, {})]
        if conflicting:
            raise PruneError(
                f"select.plan: a plan that is replayed leaves nothing to choose; leave out {' and '.join(conflicting)} "
                "(on the command line: key= with nothing after it)"
            )
        if bundle and Path(bundle).expanduser().resolve() == Path(str(section.plan)).expanduser().resolve():
            return Plan.from_kept(self.graph, {}, {group.name: "nothing more is cut" for group in self.graph.groups})
        return files.read_plan(Path(str(section.plan)).expanduser(), self.graph, say)
