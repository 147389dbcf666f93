"""The sections of a recipe that say what is measured beside the accuracy: Information, Report."""

from typing import Annotated, Literal

from pydantic import Field

from dist_prune.config.section import BATCH, LONG, MANY, Section


class Information(Section):
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


class Report(Section):
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
