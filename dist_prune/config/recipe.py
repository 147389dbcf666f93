"""The whole recipe as a typed, strict model; ``loading.py`` reads it from files."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from dist_prune.config.cluster import Cluster
from dist_prune.config.data import Backbone, Data
from dist_prune.config.pruning import Repair, Schedule, Score, Select, Target
from dist_prune.config.report import Information, Report
from dist_prune.config.section import Section
from dist_prune.config.stage_keys import Network, Operational, ReadBy, Seed
from dist_prune.config.training import Evaluate, Training


def _check_folder_name(value: str) -> str:
    if not value.strip("."):
        raise ValueError("it names the run's folder, so it cannot be dots alone")
    return value


FINETUNE_LR = 0.01


def _fill_finetune_lr(section: Any) -> Any:
    """Fill in the default learning rate of a finetuning that names none."""
    return {"lr": FINETUNE_LR, **section} if isinstance(section, dict) else section


class Recipe(Section):
    """All keys of one run. ``method`` holds the name of the paper's method and its options."""

    name: Annotated[str, AfterValidator(_check_folder_name), ReadBy(("export",))] = Field(
        pattern=r"^[\w.-]+$",
        max_length=200,
        description="name of the run, whose folder is runs/<name>; default: the file's name",
    )
    seed: Seed[int] = Field(
        default=0,
        ge=0,
        le=2**63 - 1,
        description="seed of initial weights, image orders, augmentation, calibration images and random methods",
    )
    task: Network[dict[str, Any]] = Field(
        default_factory=lambda: {"name": "classification"},
        description="name of the task (classification by default), and its own keys",
    )
    backbone: Backbone
    data: Data
    train: Annotated[Training, ReadBy(("train",), {"holdout": ("many", "search"), "images": ("many", "search")})] = (
        Training()
    )
    score: Score = Score()
    method: Annotated[
        dict[str, Any], ReadBy(("many", "select"), {"name": ("export",), "fidelity": ("prune",), "quirks": ("prune",)})
    ] = Field(description="name of the method, or auto for the recommended one, and its own keys (below)")
    select: Annotated[Select, ReadBy(("many", "select"), {"norms": ("repair",), "depth": ("score",)})] = Select()
    target: Annotated[Target, ReadBy(("many", "select", "evaluate_in_rounds"))] = Target()
    repair: Repair = Repair()
    schedule: Annotated[Schedule, ReadBy(("finetune_in_rounds", "evaluate_in_rounds"))] = Schedule()
    finetune: Annotated[
        Training, BeforeValidator(_fill_finetune_lr), ReadBy(("finetune", "finetune_between"), {"epochs": ("export",)})
    ] = Training(lr=FINETUNE_LR)
    reruns: Annotated[int, ReadBy(("finetune",))] = Field(
        default=1,
        ge=1,
        le=1000,
        description="number of finetunings of the same pruned network, each with its own seed; the first is kept",
    )
    evaluate: Annotated[Evaluate, ReadBy(("many", "evaluate", "curves"))] = Evaluate()
    information: Annotated[Information, ReadBy(("curves",))] = Information()
    report: Annotated[Report, ReadBy(("evaluate",))] = Report()
    cluster: Operational[Cluster] = Cluster()

    @property
    def between(self) -> Training:
        """The finetuning between two rounds; it is never skipped by ``only_if_drop``."""
        body = self.finetune.model_dump() | {"epochs": self.schedule.finetune_epochs, "only_if_drop": None}
        return Training.model_validate(body)

    @model_validator(mode="after")
    def _check_between(self):
        if self.schedule.rounds > 1:
            try:
                _ = self.between
            except ValidationError as error:
                raise ValueError(f"schedule.finetune_epochs: {error.errors()[0]['msg']}") from error
        return self

    # dotted key -> its text before ${VARIABLES} were filled in
    _written: dict[str, str] = PrivateAttr(default_factory=dict)

    def with_written(self, texts: Mapping[str, str]) -> "Recipe":
        """A copy that remembers its values before ``${VARIABLES}`` were filled in.

        Args:
            texts: dotted key -> the text as it was written.
        """
        recipe = self.model_copy()
        recipe._written = dict(texts)
        return recipe

    # why method.name=auto became the method; empty: the recipe names it
    _choice: str = PrivateAttr(default="")
    _chosen_selection: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def choice(self) -> str:
        """Why the method was taken, if the recipe says ``method.name: auto``; else an empty text."""
        return self._choice

    @property
    def repairs(self) -> bool:
        """Whether pruned networks are repaired, by ``repair.method`` or ``select.norms``."""
        return bool(self.repair_name)

    @property
    def repair_name(self) -> str:
        """What the stage ``repair`` does, for a line; empty if there is no such stage."""
        refit = ["refit of norms over channels"] if self.select.norms == "refit" else []
        return ", ".join([*refit, *([self.repair.method] if self.repair.method != "none" else [])])

    @property
    def repair_off(self) -> str:
        """The keys that leave the stage ``repair`` out."""
        off = ["repair.method=none"] if self.repair.method != "none" else []
        return " and ".join([*off, *(["select.norms=plain"] if self.select.norms == "refit" else [])])

    @model_validator(mode="after")
    def _check_refit(self):
        if self.select.norms == "refit" and not self.backbone.streams:
            raise ValueError(
                "select.norms: norms over channels lose channels only if streams are pruned. Set "
                "backbone.streams=true, or select.norms=plain"
            )
        return self

    @model_validator(mode="after")
    def _check_depth(self):
        if self.select.depth and (self.score.compare or self.select.search or self.select.from_):
            other = "score.compare" if self.score.compare else "select.search" if self.select.search else "select.from"
            raise ValueError(f"select.depth: {other} chooses among channels alone. Leave one of the two out")
        return self

    @property
    def chosen_selection(self) -> dict[str, Any]:
        """The keys of ``select`` that came with that method."""
        return dict(self._chosen_selection)

    def with_choice(
        self, why: str, method: Mapping[str, Any] | None = None, selection: Mapping[str, Any] | None = None
    ) -> "Recipe":
        """A copy whose method was chosen for it.

        Args:
            why: the reason, as a line.
            method: the chosen method's section; None: the recipe's own.
            selection: keys of ``select`` that came with the method; with a ``method``, those of the recipe's own choice
                get their defaults again.
        """
        update: dict[str, Any] = {}
        if method is not None:
            defaults = {key: type(self.select).model_fields[key].default for key in self._chosen_selection}
            select = self.select.model_copy(update={**defaults, **(selection or {})})
            update = {"method": dict(method), "select": select}
        recipe = self.model_copy(update=update)
        recipe._choice, recipe._chosen_selection = why, dict(selection or {})
        return recipe

    def written(self) -> dict[str, Any]:
        """``resolved()`` with ``${VARIABLES}`` as they were written, for files and reports.

        Only ``name`` is filled in, because it is the run's folder.
        """
        tree = self.resolved()
        for key, text in self._written.items():
            node: Any = tree
            *parents, leaf = key.split(".")
            for step in parents:
                node = _entry(node, step)
            if key != "name" and _entry(node, leaf) is not None:
                node[int(leaf) if isinstance(node, list) else leaf] = text
        return tree

    @property
    def expanded(self) -> dict[str, list[str]]:
        """Dotted key -> names of the environment's variables that were filled in."""
        return {key: sorted(set(re.findall(r"\$\{(\w+)\}", text))) for key, text in self._written.items()}

    def resolved(self) -> dict[str, Any]:
        """JSON-ready values of every key, with defaults filled in."""
        return self.model_dump(mode="json", by_alias=True)


def _entry(node: Any, step: str) -> Any:
    """An entry of a mapping or a list, or None."""
    if isinstance(node, list):
        return node[int(step)] if step.isdigit() and int(step) < len(node) else None
    return node.get(step) if isinstance(node, dict) else None


def selected_on_test(tree: Mapping[str, Any]) -> list[str]:
    """The choices that a recipe makes by test images, which make its figures on them too good.

    Args:
        tree: a resolved recipe.

    Returns:
        A line for each choice.
    """
    lines = []
    for name in ("train", "finetune"):
        training = tree[name]
        if not training["epochs"]:
            continue
        if training["selection"] == "test":
            lines.append(f"{name}: the kept epoch was selected on the test images")
        elif training["selection"] == "last" and training["patience"]:  # without held-out images there are no others
            lines.append(f"{name}: the last epoch was chosen on the test images (patience)")
    if "test_images" in tree["method"].get("quirks", ()) and not tree["select"]["plan"]:
        lines.append("method: channels were ranked by the test images (quirk test_images)")
    return lines
