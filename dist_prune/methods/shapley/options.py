"""Options of Shapley values."""

from typing import Literal

from pydantic import Field

from dist_prune.methods import base

Quirk = Literal["raw_outputs", "training_images", "augmented_images", "test_images"]


class Options(base.QuirkOptions[Quirk], base.RankingOptions):
    """Keys of ``method`` in a recipe of Shapley values.

    ``samples`` may rise later in the same run directory: the measured sets are used again. The quirk ``test_images`` is
    a leak of the ImageNet programs; as_released leaves it out.
    """

    released = ("raw_outputs", "training_images", "augmented_images")

    estimator: Literal["kernel", "permutation", "combin"] = Field(
        default="kernel",
        description="estimator of the values: regression on random sets, mean over permutations, or sum over all sets "
        "of some sizes",
    )
    samples: int = base.refinable(
        30, ge=1, le=10**9, description="number of random sets or permutations per group, at most"
    )
    until: Literal["samples", "stable"] = base.refinable(
        "samples", description="end of the sampling of a group: after all samples, or when its ranking is reliable"
    )
    reliability: float = base.refinable(
        0.95, gt=0, lt=1, description="until stable: share of the values' variance that is not sampling error"
    )
    k: int = Field(
        default=1, ge=1, le=10**6, description="combin: number of removal steps in the sum (1: leave one out)"
    )
    adding: bool = Field(default=False, description="combin: the last k removal steps instead of the first")
    stack: int = Field(default=4, ge=1, le=65536, description="number of sets that are evaluated in one forward pass")
    memory_mb: int = base.select_only(
        1024, ge=1, le=10**9, description="memory for a process's kept activations, in MiB; changes no score"
    )
    kernel: Literal["ols", "shap"] = base.select_only(
        "ols", description="regression: plain least squares (the released program's), or Kernel SHAP's weights and sum"
    )
