"""Options of MINT."""

from typing import Annotated, Literal

from pydantic import Field

from dist_prune.methods import base

Quirk = Literal[
    "independent_samples",
    "with_replacement",
    "duplicates_unconnected",
    "swapped_neighbour",
    "edge_numbers",
    "clamped_score",
    "numbered_parents",
    "distinct_cap",
]

Count = Annotated[int, Field(ge=1, le=10**6)]
Share = Annotated[float, Field(ge=0, le=1)]


class Options(base.QuirkOptions[Quirk], base.RankingOptions):
    """Keys of ``method`` in a recipe of MINT.

    A layer has ``groups`` groups, or the largest number below it that divides the layer's width. ``parent_groups``,
    ``child_groups`` and ``caps`` are for single pairs, by the child layer's name or a glob of it.
    """

    criterion: Literal["information", "l1", "random"] = Field(
        default="information",
        description="score of blocks: the paper's mutual information, their mean absolute weight over that of the "
        "layer, or chance; the last two need no images and are what the first is compared with",
    )
    groups: int = Field(default=64, ge=1, le=10**6, description="number of groups of filters per layer")
    parent_groups: dict[str, Count] = Field(
        default={}, description="exact number of groups of its input channels, by child layer"
    )
    child_groups: dict[str, Count] = Field(
        default={}, description="exact number of groups of its filters, by child layer"
    )
    skip: tuple[str, ...] = Field(default=(), description="globs of layers that keep all their weights")
    taps: Literal["raw", "consumed"] = Field(
        default="raw", description="activations that are read: outputs of layers, or inputs of the layers after them"
    )
    samples_per_class: Count | None = Field(
        default=None, description="number of calibration images taken from each class; null: all"
    )
    memory_mb: int = base.select_only(
        2048, ge=64, le=10**9, description="memory for a process's distance tables, in MiB; changes no score"
    )
    p: tuple[Share, ...] = base.select_only(
        (), description="quantile of the scores up to which blocks are cut; a grid, of which select.index takes one"
    )
    quantile: Literal["distinct", "entries", "weights"] = base.select_only(
        "weights", description="unit that p counts; distinct scores in the paper's program"
    )
    cap: float | None = base.select_only(
        None, gt=0, le=1, description="largest share of a child layer's weights that may be cut; null: no cap"
    )
    caps: dict[str, Annotated[Share, Field(gt=0)]] = base.select_only({}, description="its own cap, by child layer")
    promote: bool = base.select_only(
        True, description="removal of channels all of whose blocks are cut, instead of masking them"
    )
    structured: bool | None = base.select_only(
        None, description="removal of whole channels by summed score instead of blocks; null: if there is no p"
    )
