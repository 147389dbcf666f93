"""The recipe sections from scoring to rounds of pruning: Score, Select, Target, Repair, Schedule."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from dist_prune import plugins
from dist_prune.config.search import Search
from dist_prune.config.section import BATCH, LONG, MANY, PathText, Section
from dist_prune.config.stage_keys import Calibration, External, MicroBatch, Operational, ReadBy, Repairing
from dist_prune.errors import PruneError

SETTINGS = ("latency_batch", "tolerance", "latency_tolerance")  # keys of ``target`` that name no cost


def _count_or_all(value: Any) -> Any:
    if value != "all" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MANY):
        raise ValueError(f"score.images must be a positive number or 'all' (at most {MANY:,})")
    return value


RepairMethod = Literal["none", "norms", "bias", "fold", "least_squares"]


class Score(Section):
    """The calibration images of the scores, and the origin of the scores."""

    images: Annotated[
        Annotated[int, Field(ge=1, le=MANY)] | Literal["all"],
        BeforeValidator(_count_or_all),
        ReadBy(("many", "score")),
    ] = Field(default=1000, description="number of calibration images drawn from the training images, or all")
    micro_batch: MicroBatch[int] = Field(default=50, ge=1, le=BATCH, description="number of images in one forward pass")
    balance: Calibration[Literal["uniform", "class"]] = Field(
        default="uniform",
        description="drawing of the calibration images: uniform from all training images, or the same number of each "
        "class",
    )
    from_: External[PathText | None] = Field(
        default=None, alias="from", description="run directory whose scores are used; default: the run computes its own"
    )
    compare: Annotated[tuple[str, ...], ReadBy(("many",))] = Field(
        default=(), description="names of methods scored in one pass and compared at the recipe's target"
    )
    save_every: Operational[int] = Field(
        default=100, ge=1, le=MANY, description="number of micro-batches per rank between two saves of a partial score"
    )
    record: Operational[PathText | None] = Field(
        default=None,
        description="shapley: file of single measurements, read and extended; default: a file in the run directory",
    )


Count = Annotated[int, Field(ge=1, le=LONG)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class Select(Section):
    """How the pruning plan follows from the scores."""

    threshold: float | None = Field(
        default=None, ge=0, le=1, description="similarity threshold, for methods that have one"
    )
    keep_ratio: float | None = Field(
        default=None, gt=0, le=1, description="share of the channels that are kept, for ranking methods"
    )
    counts: dict[str, Count] | tuple[Count, ...] | None = Field(
        default=None,
        description="numbers of channels that are kept, for ranking methods: glob of layer names -> number (the first "
        "match counts; other groups stay whole), or a list with one number for each free group in order",
    )
    scope: Literal["local", "global", "isomorphic"] = Field(
        default="local",
        description="range of the ranking: local within each group, global over all groups, isomorphic over the "
        "groups of equal structure (layer types and kernels, whatever their widths)",
    )
    min_channels: int = Field(
        default=1,
        ge=1,
        le=LONG,
        description="smallest number of channels of a group; of whole units (heads, conv groups) one may be left",
    )
    round_to: int = Field(
        default=0,
        ge=0,
        le=LONG,
        description="divisor of the number of kept channels, in groups wider than it; 0: 8 for targets of MACs and "
        "latency in groups of 64 channels or more, else 1",
    )
    max_ratio: Ratio | dict[str, Ratio] | None = Field(
        default=None, description="largest share of a group's channels that is removed, or glob of layer names -> share"
    )
    keep_ratios: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict,
        description="glob of layer names -> share of the channels that these groups keep, independent of the other "
        "groups",
    )
    include: tuple[str, ...] = Field(
        default=(), description="globs of layer names whose groups alone are pruned; default: all"
    )
    exclude: tuple[str, ...] = Field(default=(), description="globs of layer names whose groups are not pruned")
    index: int | None = Field(
        default=None, ge=1, le=LONG, description="position in the method's grid of values, from 1"
    )
    norms: Literal["plain", "refit"] = Field(
        default="plain",
        description="norms over channels that lose channels: plain leaves scale and shift as they were cut, refit sets "
        "them by least squares to the dense outputs on repair.images images, in the stage repair",
    )
    depth: bool | Literal["only"] = Field(
        default=False,
        description="removal of whole residual blocks, for ranking methods: blocks of equal structure are ranked by "
        "how much they change what they read, and as large a share of them goes as of channels (global: they compete "
        "with channels); only: blocks alone go, and all channels of the others stay",
    )
    plan: PathText | None = Field(
        default=None,
        description="plan to replay without scores: a plan.json, a file {layer: {saved_idxs, mask_num}}, or the "
        "folder of "
        "a bundle, whose weights are then finetuned",
    )
    search: Search | None = Field(
        default=None, description="search for the ratio of each group, for ranking methods: a section, or null for none"
    )
    from_: PathText | None = Field(
        default=None,
        alias="from",
        description="run directory of a search, whose best network within the target is taken instead of a new search",
    )


class Target(Section):
    """The size of the pruned network as a share of one cost of the dense network; at most one cost.

    The fields are in every resolved recipe. Other registered costs (pruning/selection/cost.py) are keys as well, which
    a resolved recipe has only if it sets them.
    """

    model_config = ConfigDict(extra="allow")
    costs: ClassVar[dict[str, str]] = {}  # names of registered costs that have no field -> description
    __pydantic_extra__: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(init=False)  # type: ignore[assignment]
    macs: float | None = Field(default=None, gt=0, le=1, description="share of the dense multiply-accumulates to keep")
    params: float | None = Field(default=None, gt=0, le=1, description="share of the dense parameters to keep")
    channels: float | None = Field(default=None, gt=0, le=1, description="share of the dense channels to keep")
    memory: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the dense network's peak of activations in a forward pass, the same for every batch",
    )
    latency: float | None = Field(
        default=None, gt=0, le=1, description="share of the dense network's time of a forward pass, on this device"
    )
    latency_batch: int = Field(default=1, ge=1, le=BATCH, description="number of images of that forward pass")
    tolerance: float | None = Field(
        default=0.01,
        gt=0,
        le=100,
        description="largest miss of target.macs, target.params, target.channels or target.memory, as a share of it; a "
        "larger one ends the run with exit code 3, after the report; null: any miss is accepted",
    )
    latency_tolerance: float | None = Field(
        default=0.05,
        gt=0,
        le=100,
        description="largest miss of target.latency, whose times scatter; also the precision at which its search stops",
    )

    @model_validator(mode="after")
    def _check_one_cost(self):
        costs = [name for name, _ in self._shares()]
        if len(costs) > 1:
            raise ValueError(f"one target at a time, got {' and '.join(costs)}")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _check_keys(cls, section: Any, handler: ValidatorFunctionWrapHandler):
        """Refuse unknown keys, in one list with everything else that is wrong."""
        if not isinstance(section, dict):
            return handler(section)
        costs = cls.other_costs()
        odd = [key for key in section if key not in cls.model_fields and key not in costs]
        known = {k: v for k, v in section.items() if k in cls.model_fields or (k in costs and v is not None)}
        for key in known:
            if known[key] is not None:
                cls._check_plugin(key)
        wrong = [InitErrorDetails(type="extra_forbidden", loc=(str(key),), input=section[key]) for key in odd]
        try:
            made = handler(known)
            if not odd:
                return made
        except ValidationError as error:
            if not odd:
                raise
            wrong += [
                InitErrorDetails(
                    type=PydanticCustomError(item["type"], "{said}", {"said": item["msg"]}),  # type: ignore[arg-type]
                    loc=item["loc"], input=item["input"],
                )
                for item in error.errors()
            ]  # fmt: skip
        raise ValidationError.from_exception_data(cls.__name__, wrong)

    @classmethod
    def other_costs(cls) -> dict[str, str]:
        """Name -> description of the costs that have no field: registered ones, and those of installed packages."""
        of_others = {
            plugin.name: f"share to keep of the cost that {plugin.package} counts"
            for plugin in plugins.installed("cost")
        }
        return {name: text for name, text in of_others.items() if name not in cls.model_fields} | cls.costs

    @classmethod
    def _check_plugin(cls, name: str) -> None:
        """Raise a PruneError for a cost of another package that cannot be used."""
        own = name in cls.model_fields and name not in cls.costs
        plugin = plugins.find("cost", name, "a key of target" if own else "")
        if plugin is not None:
            plugins.load(plugin)
        if why := plugins.why_unusable("cost", name):
            raise PruneError(why)

    def _shares(self) -> list[tuple[str, float]]:
        """(cost, share) of each cost that is set."""
        return [(name, value) for name, value in self if name not in SETTINGS and value is not None]

    def asked(self) -> tuple[str, float] | None:
        """The name of the cost and the share to keep; None if no target is set."""
        return next(iter(self._shares()), None)


class Repair(Section):
    """Repair of the pruned network in closed form, without labels and training, before any finetuning."""

    method: Repairing[RepairMethod] = Field(
        default="none",
        description="repair after the cut: norms (batch-norm statistics), bias (mean shifts), fold (removed channels "
        "into the kept ones that are most like them), least_squares (weights and biases of all layers that read what "
        "was cut, in order), or none, which leaves the stage out",
    )
    images: Repairing[int] = Field(
        default=256, ge=1, le=MANY, description="number of images, drawn from the training images"
    )
    ridge: Repairing[Annotated[float, Field(ge=1e-12, le=1e6)] | Literal["auto"]] = Field(
        default="auto",
        description="least_squares: pull towards the weights as they were cut, relative to the mean square of a "
        "layer's inputs; auto: for each layer the value that does best on images that it was not fitted to",
    )
    micro_batch: Repairing[int] = Field(default=16, ge=1, le=BATCH, description="number of images in one forward pass")
    memory_mb: Operational[int] = Field(
        default=2048, ge=0, le=2**30, description="MiB of activations that a process may hold between two layers"
    )


class Schedule(Section):
    """Pruning in one shot or in rounds of scoring, pruning and finetuning; ``finetune`` follows the last round."""

    rounds: Annotated[int, ReadBy(("select_in_rounds",))] = Field(
        default=1, ge=1, le=1000, description="number of rounds of scoring and pruning; 1: one shot"
    )
    spacing: Annotated[Literal["geometric", "linear"], ReadBy(("select_in_rounds",))] = Field(
        default="geometric",
        description="decrease of target, keep ratios and counts over the rounds: by equal factors (geometric) or in "
        "equal steps (linear); a threshold is applied anew in each round",
    )
    finetune_epochs: Annotated[int, ReadBy(("finetune_between",))] = Field(
        default=1,
        ge=0,
        le=LONG,
        description="epochs of finetuning between two rounds; the other keys of finetune apply to it",
    )
    carry_optimizer: Annotated[bool, ReadBy(("finetune_between",))] = Field(
        default=False,
        description="continuation of the kept epoch's optimizer state and averaged weights in the next round's "
        "finetuning, pruned like the weights",
    )
