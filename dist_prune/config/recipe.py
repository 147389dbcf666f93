"""The whole recipe: typed, strict. Knows no torch. (loading.py reads files and says what is wrong in them.)"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from dist_prune.config.cluster import Cluster
from dist_prune.config.data import Backbone, Data
from dist_prune.config.pruning import Schedule, Score, Select
from dist_prune.config.report import Information, Report
from dist_prune.config.section import Section
from dist_prune.config.stage_keys import Operational, ReadBy, Seed
from dist_prune.config.target import Target
from dist_prune.config.training import Evaluate, Training


def _folder_name(value: str) -> str:
    if not value.strip("."):
        raise ValueError("it names the run's folder, so it cannot be dots alone")
    return value


FINETUNE_LR = 0.01


def _finetuned(section: Any) -> Any:
    """A finetuning without a rate has its own default, also where the section says other things."""
    return {"lr": FINETUNE_LR, **section} if isinstance(section, dict) else section


class Recipe(Section):
    """Everything one run does. ``method`` is the paper's name and its options."""

    name: Annotated[str, AfterValidator(_folder_name), ReadBy(("export",))] = Field(
        pattern=r"^[\w.-]+$", max_length=200, description="of the run, runs/<name>; left out: the file's name"
    )
    seed: Seed[int] = Field(
        default=0,
        ge=0,
        le=2**63 - 1,
        description="of weights, orders, augmentation, calibration images and random methods",
    )
    backbone: Backbone
    data: Data
    train: Annotated[Training, ReadBy(("train",), {"holdout": ("many",), "images": ("many",)})] = Training()
    score: Score = Score()
    method: Annotated[
        dict[str, Any], ReadBy(("many", "select"), {"name": ("export",), "fidelity": ("prune",), "quirks": ("prune",)})
    ] = Field(description="name, and the method's own keys (below)")
    select: Annotated[Select, ReadBy(("many", "select"))] = Select()
    target: Annotated[Target, ReadBy(("many", "select", "evaluate_in_rounds"))] = Target()
    schedule: Annotated[Schedule, ReadBy(("finetune_in_rounds", "evaluate_in_rounds"))] = Schedule()
    finetune: Annotated[
        Training, BeforeValidator(_finetuned), ReadBy(("finetune", "finetune_between"), {"epochs": ("export",)})
    ] = Training(lr=FINETUNE_LR)
    reruns: Annotated[int, ReadBy(("finetune",))] = Field(
        default=1,
        ge=1,
        le=1000,
        description="finetunings of the same pruned network by as many seeds; the first is kept",
    )
    evaluate: Annotated[Evaluate, ReadBy(("many", "evaluate", "curves"))] = Evaluate()
    information: Annotated[Information, ReadBy(("curves",))] = Information()
    report: Annotated[Report, ReadBy(("evaluate",))] = Report()
    cluster: Operational[Cluster] = Cluster()

    @property
    def between(self) -> Training:
        """The training between two rounds: once, whatever cutting cost."""
        body = self.finetune.model_dump() | {"epochs": self.schedule.finetune_epochs, "only_if_drop": None}
        return Training.model_validate(body)

    @model_validator(mode="after")
    def _between(self):
        if self.schedule.rounds > 1:
            try:
                _ = self.between
            except ValidationError as error:
                raise ValueError(f"schedule.finetune_epochs: {error.errors()[0]['msg']}") from error
        return self

    # dotted key -> its text before ${VARIABLES} were filled in
    _written: dict[str, str] = PrivateAttr(default_factory=dict)

    def with_written(self, texts: Mapping[str, str]) -> "Recipe":
        """The same recipe, which knows how its values were written before ``${VARIABLES}`` were filled in."""
        out = self.model_copy()
        out._written = dict(texts)
        return out

    def written(self) -> dict[str, Any]:
        """``resolved()`` with ``${VARIABLES}`` as they were written: what may be kept in files and shown.

        ``name`` alone stands there filled in: it is the run's folder.
        """
        tree = self.resolved()
        for key, text in self._written.items():
            node: Any = tree
            *parents, leaf = key.split(".")
            for step in parents:
                node = _inside(node, step)
            if key != "name" and _inside(node, leaf) is not None:
                node[int(leaf) if isinstance(node, list) else leaf] = text
        return tree

    @property
    def expanded(self) -> dict[str, list[str]]:
        """Dotted key -> the environment's variables that were filled in there."""
        return {key: sorted(set(re.findall(r"\$\{(\w+)\}", text))) for key, text in self._written.items()}

    def resolved(self) -> dict[str, Any]:
        """Plain, JSON-ready values of every key, defaults filled in."""
        return self.model_dump(mode="json", by_alias=True)


def _inside(node: Any, step: str) -> Any:
    """A value of a mapping or a list, None where there is none."""
    if isinstance(node, list):
        return node[int(step)] if step.isdigit() and int(step) < len(node) else None
    return node.get(step) if isinstance(node, dict) else None


def selected_on_test(tree: Mapping[str, Any]) -> list[str]:
    """What the test images decided in a resolved recipe: its figures on them are too good."""
    out = []
    for name in ("train", "finetune"):
        spec = tree[name]
        if not spec["epochs"]:
            continue
        if spec["selection"] == "test":
            out.append(f"{name}: the kept epoch was selected on the test images")
        elif spec["selection"] == "last" and spec["patience"]:  # without held-out images there are no others
            out.append(f"{name}: the last epoch was chosen on the test images (patience)")
    if "test_images" in tree["method"].get("quirks", ()) and not tree["select"]["plan"]:
        out.append("method: channels were ranked by the test images (quirk test_images)")
    return out
