"""What every stage is handed: the recipe, the processes, the run directory, and where the run has got to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_prune.config.compatibility import first_name, keeps_first_names
from dist_prune.config.recipe import Recipe
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.methods.base import Method
from dist_prune.pipeline.artifact_store import ArtifactStore
from dist_prune.pipeline.images import RunImages
from dist_prune.pipeline.ledger import Ledger
from dist_prune.pipeline.networks import RunNetworks
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.selection.schedule import round_config
from dist_prune.training.tracking import Tracker

Tensors = dict[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]]  # file -> (named tensors, meta)


@dataclass
class StageOutput:
    """What a stage hands back; the runner writes it.

    Attributes:
        facts: figures for the ledger and the report (plain JSON values).
        tensors: file -> (named tensors, meta), written as safetensors.
        texts: file -> text.
        drop: files that are no longer needed once the rest is written.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


@dataclass
class RunContext:
    """One run of one recipe in one run directory.

    Attributes:
        recipe: the validated recipe.
        environment: the device and the processes of this run.
        tracker: the log and the trackers (TensorBoard and others).
        run_dir: the run directory.
        method: the recipe's method with its options.
        events: notes for the report, of all stages so far.
        stage_fingerprint: fingerprint of the running stage.
        round: the round that the running stage belongs to, from 1.
        measurement_fingerprint: what single measurements of the score stage belong to.
        artifact_store: where the tasks of a sweep share artifacts; None outside of sweeps.
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
        """The name of an artifact in this run directory, which may have been begun before artifacts were renamed."""
        return first_name(name) if self._keeps_first_names else name

    def path(self, name: str) -> Path:
        """The file of an artifact in the run directory."""
        return self.run_dir / self.artifact(name)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """The named tensors of an artifact; PruneError if the file is missing or damaged."""
        return tensor_files.read_tensors(self.path(name))[0]

    @cached_property
    def selection(self) -> SelectionRequest:
        """What the recipe's select and target sections ask for."""
        return SelectionRequest.of(self.recipe)

    def selection_graph(self) -> DependencyGraph:
        """The dense network's graph without the groups that the recipe excludes; PruneError if the method refuses."""
        return self.method.prepare(self.networks.graph, self.recipe.select.exclude, self.selection)

    def round_selection(self, graph: DependencyGraph) -> SelectionRequest:
        """What the current round is asked for, of the ``graph`` that it prunes."""
        schedule = self.recipe.schedule
        return round_config(self.selection, graph, self.round, schedule.rounds, schedule.spacing)
