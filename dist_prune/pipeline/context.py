"""The context of a run, which every stage receives, and the output that every stage returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_prune.config.recipe import Recipe
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.methods.base import Method
from dist_prune.pipeline.artifact_store import ArtifactStore
from dist_prune.pipeline.earlier_artifact_names import first_name, keeps_first_names
from dist_prune.pipeline.images import RunImages
from dist_prune.pipeline.ledger import Ledger
from dist_prune.pipeline.networks import RunNetworks
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.selection.schedule import round_config
from dist_prune.tasks import build as build_task
from dist_prune.tasks.base import Task
from dist_prune.training.tracking import Tracker

Tensors = dict[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]]  # file -> (named tensors, meta)


@dataclass
class StageOutput:
    """The output of a stage; the runner writes it on the first rank.

    Attributes:
        facts: Figures for the ledger and the report (plain JSON values).
        tensors: File -> (named tensors, metadata), written as safetensors. Files are relative to the run directory.
        texts: File -> text, relative to the run directory.
        drop: Folders that are deleted after the output is written and in the ledger, relative to the run directory.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


@dataclass
class RunContext:
    """One run of one recipe in one run directory.

    Attributes:
        recipe: The validated recipe.
        environment: The device and the processes of this run.
        tracker: The log and the trackers (TensorBoard and others).
        run_dir: The run directory. It exists and belongs to this recipe.
        method: The recipe's method with its options.
        events: Events of all stages so far, for the report: dicts with ``stage``, ``event`` and details.
        stage_fingerprint: Fingerprint of the running stage; the runner sets it.
        round: Round that the running stage belongs to, counted from 1; the runner sets it.
        measurement_fingerprint: Fingerprint that the single measurements of the score stage are recorded under; the
            runner sets it.
        artifact_store: Store in which the tasks of a sweep share artifacts; None outside of sweeps.
    """

    recipe: Recipe
    environment: DistributedEnvironment
    tracker: Tracker
    run_dir: Path
    method: Method
    events: list[dict[str, Any]] = field(default_factory=list)
    stage_fingerprint: str = ""
    round: int = 1
    measurement_fingerprint: str = ""
    artifact_store: ArtifactStore | None = None

    @cached_property
    def task(self) -> Task:
        """What the network learns and how it is measured."""
        return build_task(self.recipe.task)

    @cached_property
    def images(self) -> RunImages:
        """The images of this run."""
        return RunImages(self.recipe, self.environment, self.tracker)

    @cached_property
    def networks(self) -> RunNetworks:
        """The networks of this run."""
        return RunNetworks(self.recipe, self.method, self.images, self.path)

    @property
    def ledger(self) -> Ledger:
        """The record of finished stages."""
        return Ledger(self.run_dir)

    @cached_property
    def _keeps_first_names(self) -> bool:
        return keeps_first_names(self.run_dir, (name for line in self.ledger.lines() for name in line["outputs"]))

    def artifact(self, name: str) -> str:
        """The name of an artifact in this run directory, which may be older than a renaming of artifacts.

        Args:
            name: Today's name, relative to the run directory.
        """
        return first_name(name) if self._keeps_first_names else name

    def path(self, name: str) -> Path:
        """The file of an artifact in the run directory."""
        return self.run_dir / self.artifact(name)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """The named tensors of an artifact.

        Raises:
            PruneError: The file is missing or damaged.
        """
        return tensor_files.read_tensors(self.path(name))[0]

    @cached_property
    def selection(self) -> SelectionRequest:
        """The selection that the recipe's ``select`` and ``target`` sections request of the whole run."""
        return SelectionRequest.of(self.recipe)

    def selection_graph(self) -> DependencyGraph:
        """The dense network's dependency graph, without the groups that the recipe excludes.

        Raises:
            PruneError: The method cannot prune this network as the recipe requests.
        """
        return self.method.prepare(self.networks.graph, self.recipe.select.exclude, self.selection)

    def round_selection(self, graph: DependencyGraph) -> SelectionRequest:
        """The selection that the current round requests.

        Args:
            graph: The dependency graph of the network that the round prunes.
        """
        schedule = self.recipe.schedule
        return round_config(self.selection, graph, self.round, schedule.rounds, schedule.spacing)
