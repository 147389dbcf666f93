"""The section of a recipe that says how processes work together: Cluster."""

from pydantic import Field

from dist_prune.config.section import LONG, Section


class Cluster(Section):
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
