"""The recipe section on the search for each group's ratio: ``select.search``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_prune.config.section import BATCH, MANY, Section

OF_EVOLUTION = ("candidates", "images", "repair", "repair_images", "micro_batch", "targets")


class Search(Section):
    """Search for the number of channels of each group; a ranking method gives the order inside a group."""

    solver: Literal["evolution", "knapsack"] = Field(
        default="evolution",
        description="evolution: networks are cut and judged, the best ones are varied; knapsack: the largest sum of "
        "importance within the target, by dynamic programming, without images",
    )
    candidates: int = Field(
        default=200, ge=1, le=10**6, description="number of candidates of the evolution; the first is the uniform plan"
    )
    judge: Literal["heldout"] = Field(
        default="heldout",
        description="images that judge a candidate by the task's primary figure: training images that train.holdout "
        "holds out",
    )
    images: int = Field(default=2000, ge=1, le=MANY, description="number of judging images")
    repair: Literal["norms", "none"] = Field(
        default="norms", description="repair of a candidate before it is judged: batch-norm statistics, or none"
    )
    repair_images: int = Field(
        default=200, ge=1, le=MANY, description="number of images of that repair, none of which judges"
    )
    micro_batch: int = Field(default=100, ge=1, le=BATCH, description="number of images in one forward pass")
    targets: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(),
        description="further shares of the target's cost that the same search serves; select.from takes one of them",
    )

    @model_validator(mode="after")
    def _check_solver(self):
        if self.solver == "knapsack":
            set_ = [name for name in OF_EVOLUTION if getattr(self, name) != type(self).model_fields[name].default]
            if set_:
                raise ValueError(
                    f"solver knapsack judges no candidates; leave out {', '.join(set_)}, or write solver: evolution"
                )
        if len(set(self.targets)) < len(self.targets):
            raise ValueError("targets: each share once")
        return self
