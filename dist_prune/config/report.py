"""The recipe sections on measurements besides the accuracy: Information, Report."""

from typing import Annotated, Literal

from pydantic import Field

from dist_prune.config.section import BATCH, LONG, MANY, Section


class Information(Section):
    """Curves of a ranking: figures at every number of kept filters of one group, nothing finetuned."""

    curves: Literal["none", "accuracy", "information", "all"] = Field(
        default="none",
        description="curves over the number of kept filters: accuracy is the task's primary figure; information is "
        "I(X;Z), I(Z;Y) and the total correlation of the kept filters; all is both",
    )
    layers: tuple[str, ...] = Field(default=("*",), description="globs of layer names whose groups get curves")
    images: int | None = Field(
        default=None, ge=2, le=MANY, description="number of evaluation images, from the first; null: all"
    )
    batch: int = Field(default=100, ge=2, le=BATCH, description="number of images in one kernel matrix")
    masks: int = Field(
        default=8, ge=1, le=BATCH, description="number of kept-filter counts evaluated in one forward pass"
    )
    alpha: float = Field(default=1.01, gt=0, le=1000, description="order alpha of the Renyi entropies")
    sigma_method: Literal["fix", "all", "remain"] = Field(
        default="all",
        description="kernel width of single filters: by the rule (fix), aligned to the whole layer (all), or to the "
        "kept filters (remain)",
    )
    sigma_x: float = Field(default=8.0, gt=0, le=10**9, description="kernel width of the images X")
    sigma_y: float = Field(default=0.1, gt=0, le=10**9, description="kernel width of the labels Y")


class Report(Section):
    """Latency measurements and trackers of a run."""

    latency_batches: tuple[Annotated[int, Field(ge=1, le=BATCH)], ...] = Field(
        default=(1, 32), min_length=1, max_length=64, description="batch sizes whose latency is measured"
    )
    latency_repeats: int = Field(
        default=30, ge=1, le=LONG, description="number of timed passes of each network at each batch size"
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="number of CPU threads during timing; default: all that this process may use",
    )
    trackers: tuple[str, ...] = Field(
        default=("tensorboard",),
        description="names of accelerate's trackers, for example tensorboard, wandb or mlflow; []: none",
    )
