"""The recipe section on how processes work together: Cluster."""

from pydantic import Field

from dist_prune.config.section import LONG, Section


class Cluster(Section):
    """Numerics of the devices, and how long processes wait for one another."""

    tf32: bool = Field(default=False, description="TF32 rounding of float32 products on GPUs")
    deterministic: bool = Field(
        default=False,
        description="same bits in every run on this machine; an operation that cannot guarantee them ends the run",
    )
    timeout_s: int = Field(
        default=1800, ge=10, le=LONG, description="seconds that a collective may take; a longer one ends the run"
    )
    join_timeout_s: int = Field(
        default=600,
        ge=5,
        le=LONG,
        description="seconds in which all processes have to join; then the missing ones are named and the run ends",
    )
    holder_timeout_s: int = Field(
        default=600,
        ge=15,
        le=LONG,
        description="sweeps: seconds without a sign of life after which other tasks stop waiting for the task that "
        "makes a shared artifact, and make it themselves",
    )
