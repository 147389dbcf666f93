"""What a recipe may say: typed, strict. Knows no torch. (reading.py reads files and says what is wrong in them.)"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from dist_prune.sections import BATCH, LONG, MANY, Backbone, Data, Part, PathText, Training
from dist_prune.stage_keys import Calibration, External, MicroBatch, Operational, ReadBy, Seed
from dist_prune.target import Target

__all__ = ["Backbone", "Data", "Part", "Recipe", "Training", "peeks"]


def _count_or_all(value: Any) -> Any:
    if value != "all" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MANY):
        raise ValueError(f"score.images must be a positive number or 'all' (at most {MANY:,})")
    return value


class Score(Part):
    """Which images are used to score, and how they are dealt out."""

    images: Annotated[
        Annotated[int, Field(ge=1, le=MANY)] | Literal["all"],
        BeforeValidator(_count_or_all),
        ReadBy(("many", "score")),
    ] = Field(default=1000, description="calibration images drawn from the training images, or all")
    micro_batch: MicroBatch[int] = Field(
        default=50, ge=1, le=BATCH, description="images that go through the network together"
    )
    balance: Calibration[Literal["uniform", "class"]] = Field(
        default="uniform", description="draw from all training images alike, or the same number of each class"
    )
    from_: External[PathText | None] = Field(
        default=None, alias="from", description="run directory whose scores are used instead"
    )
    compare: Annotated[tuple[str, ...], ReadBy(("many",))] = Field(
        default=(), description="methods that are scored in one pass and compared at the recipe's target"
    )
    save_every: Operational[int] = Field(
        default=100, ge=1, le=MANY, description="micro-batches per rank between two saves of a partial score"
    )
    record: Operational[PathText | None] = Field(
        default=None,
        description="file of single measurements (shapley), read and added to; default: in the run directory",
    )


Count = Annotated[int, Field(ge=1, le=LONG)]


Ratio = Annotated[float, Field(ge=0, le=1)]


class Select(Part):
    """How scores become a plan."""

    threshold: float | None = Field(
        default=None, ge=0, le=1, description="the similarity threshold of methods that have one"
    )
    keep_ratio: float | None = Field(
        default=None, gt=0, le=1, description="share of the channels that ranking methods keep"
    )
    counts: dict[str, Count] | tuple[Count, ...] | None = Field(
        default=None,
        description="channels that ranking methods keep: glob of layer names -> number (the first that fits; others "
        "stay whole), or a list, one for each free group in order",
    )
    scope: Literal["local", "global"] = Field(default="local", description="rank within each group or over all groups")
    min_channels: int = Field(
        default=1,
        ge=1,
        le=LONG,
        description="no group gets narrower than this; of whole units (heads, conv groups) one may be left",
    )
    round_to: int = Field(
        default=0, ge=0, le=LONG,
        description="kept channels are a multiple of this (where the group is wider); 0: 8 for targets of MACs and "
        "latency in groups of 64 channels and more, else 1",
    )  # fmt: skip
    max_ratio: Ratio | dict[str, Ratio] | None = Field(
        default=None, description="largest share of a group's channels that may go; or glob of layer names -> share"
    )
    keep_ratios: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict,
        description="glob of layer names -> share of the channels that these groups keep, whatever the rest does",
    )
    include: tuple[str, ...] = Field(
        default=(), description="globs of layer names: only their groups are cut; default: all"
    )
    exclude: tuple[str, ...] = Field(default=(), description="globs of layer names whose groups are left alone")
    index: int | None = Field(
        default=None, ge=1, le=LONG, description="which value of the method's grid is taken, from 1"
    )
    plan: PathText | None = Field(
        default=None,
        description="a plan.json, or {layer: {saved_idxs, mask_num}}, that is replayed unscored; a bundle's folder, "
        "whose weights are finetuned",
    )


class Schedule(Part):
    """One shot, or rounds: score, cut and finetune by turns. The last round's finetune is the recipe's."""

    rounds: Annotated[int, ReadBy(("select_in_rounds",))] = Field(
        default=1, ge=1, le=1000, description="how often the network is scored and cut; 1: one shot"
    )
    spacing: Annotated[Literal["geometric", "linear"], ReadBy(("select_in_rounds",))] = Field(
        default="geometric",
        description="how target, keep ratios and counts go down over the rounds: by equal factors, or in equal steps; "
        "a threshold is applied anew in each",
    )
    finetune_epochs: Annotated[int, ReadBy(("finetune_between",))] = Field(
        default=1, ge=0, le=LONG, description="epochs of finetuning between two rounds, by the other keys of finetune"
    )
    carry_optimizer: Annotated[bool, ReadBy(("finetune_between",))] = Field(
        default=False,
        description="the optimizer's state and averaged weights of the kept epoch go on in the next round's "
        "finetuning, cut as the weights are",
    )


class Evaluate(Part):
    batch: int = Field(default=250, ge=1, le=BATCH, description="images per step of an evaluation")


class Information(Part):
    """Curves of a ranking: what each number of kept filters of one group gives, nothing finetuned."""

    curves: Literal["none", "accuracy", "information", "all"] = Field(
        default="none", description="top-1, and I(X;Z), I(Z;Y), total correlation of what is kept, for every count"
    )
    layers: tuple[str, ...] = Field(default=("*",), description="globs of the groups that are gone through")
    images: int | None = Field(default=None, ge=2, le=MANY, description="first evaluation images only; null: all")
    batch: int = Field(default=100, ge=2, le=BATCH, description="images whose entropies are taken together")
    masks: int = Field(default=8, ge=1, le=BATCH, description="counts that go through the network together")
    alpha: float = Field(default=1.01, gt=0, le=1000, description="order of the entropies")
    sigma_method: Literal["fix", "all", "remain"] = Field(
        default="all", description="kernels of single filters: by rule, aligned to the whole layer, to what is kept"
    )
    sigma_x: float = Field(default=8.0, gt=0, le=10**9, description="kernel width of the images")
    sigma_y: float = Field(default=0.1, gt=0, le=10**9, description="kernel width of the labels")


class Report(Part):
    """What is measured for the report."""

    latency_batches: tuple[Annotated[int, Field(ge=1, le=BATCH)], ...] = Field(
        default=(1, 32), min_length=1, max_length=64, description="batch sizes that are timed"
    )
    latency_repeats: int = Field(
        default=30, ge=1, le=LONG, description="timed passes of each network at each batch size"
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads while timing; default: all this process may use"
    )
    trackers: tuple[str, ...] = Field(
        default=("tensorboard",), description="accelerate's names: tensorboard, wandb, mlflow, ... ; [] is none"
    )


class Cluster(Part):
    """How processes wait for one another."""

    tf32: bool = Field(default=False, description="let GPUs round float32 products to TF32")
    deterministic: bool = Field(
        default=False, description="the same bits in every run on this machine; what cannot promise that is refused"
    )
    timeout_s: int = Field(
        default=1800, ge=10, le=LONG, description="a collective that takes longer than this ends the run"
    )
    join_timeout_s: int = Field(
        default=600,
        ge=5,
        le=LONG,
        description="processes that have not all come together after so long are named, the run ends",
    )
    holder_timeout_s: int = Field(
        default=600, ge=15, le=LONG,
        description="sweeps: a task that makes what others wait for is given up after so long without a sign of life",
    )  # fmt: skip


def _folder_name(value: str) -> str:
    if not value.strip("."):
        raise ValueError("it names the run's folder, so it cannot be dots alone")
    return value


FINETUNE_LR = 0.01


def _finetuned(section: Any) -> Any:
    """A finetuning without a rate has its own default, also where the section says other things."""
    return {"lr": FINETUNE_LR, **section} if isinstance(section, dict) else section


class Recipe(Part):
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


def peeks(tree: Mapping[str, Any]) -> list[str]:
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
