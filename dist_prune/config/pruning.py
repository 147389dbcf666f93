"""The sections of a recipe that say what is scored and cut, and how much: Score, Select, Target, Schedule."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dist_prune.config.section import BATCH, LONG, MANY, PathText, Section
from dist_prune.config.stage_keys import Calibration, External, MicroBatch, Operational, ReadBy


def _count_or_all(value: Any) -> Any:
    if value != "all" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MANY):
        raise ValueError(f"score.images must be a positive number or 'all' (at most {MANY:,})")
    return value


class Score(Section):
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


class Select(Section):
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


class Schedule(Section):
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
