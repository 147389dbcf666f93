"""What each method gets: calibration images, images per forward pass, options, and what it needs of a user."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Need = Literal["nothing", "images", "labels", "gradients", "training"]


@dataclass(frozen=True)
class Setting:
    """How one row of the study is scored.

    Attributes:
        need: the most that it asks of a user. ``nothing``: it reads weights alone. ``images``: forward passes of images
            without labels. ``labels``: also their labels. ``gradients``: also gradients of the loss. ``training``: it
            trains weights or switches.
        images: calibration images on CIFAR-10 (MobileNetV2: at most MOST_IMAGES); 0: none.
        micro: images that go through the network together.
        method: name of the method, if it is not that of the row.
        options: of the method, the shortest that make sense.
        draws: whether anything depends on the seed, the choice of calibration images included.
    """

    need: Need
    images: int = 0
    micro: int = 50
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    draws: bool = True


MOST_IMAGES = 300  # calibration images on MobileNetV2, at most
OFFERED = 500  # images that MobileNetV2 could calibrate on; rows that ask for more have no piece there
WEIGHTS = Setting("nothing", draws=False)
FORWARD = Setting("images", 500)
GRADIENTS = Setting("gradients", 500, 5)
SETTINGS: dict[str, Setting] = {
    "random": Setting("nothing"),
    "l1": WEIGHTS,
    "l2": WEIGHTS,
    "fpgm": WEIGHTS,
    "whc": WEIGHTS,
    "bn_scale": WEIGHTS,
    "group_norm": WEIGHTS,
    "apoz": FORWARD,
    "hrank": FORWARD,
    "chip": FORWARD,
    "graph": FORWARD,
    "reconstruction": FORWARD,
    "mint": Setting("images", 250, options={"groups": 16}),
    "entropy": Setting("images", 500, options={"alpha": 2.0, "precision": "float32"}),
    "entropy, joint": Setting(
        "images", 500, method="entropy", options={"criterion": "joint", "alpha": 2.0, "precision": "float32"}
    ),
    "hrel": Setting("labels", 500, options={"grid": "coarse", "precision": "float32"}),
    "shapley": Setting("labels", 200, options={"kernel": "shap", "samples": 24}),
    "taylor": GRADIENTS,
    "taylor, 50 at a time": Setting("gradients", 500, 50, "taylor"),
    "taylor, 5000 images": Setting("gradients", 5000, 5, "taylor"),
    "taylor, not normalised": Setting("gradients", 500, 5, "taylor", {"normalise": False}),
    "fisher": Setting("gradients", 500, 50),
    "group_fisher": Setting("gradients", 500, 50),
    "group_fisher, per MACs": Setting("gradients", 500, 50, "group_fisher", {"per": "macs"}),
    "obd": GRADIENTS,
    "hessian_trace": GRADIENTS,
    "dirichlet": Setting(
        "training", 2000, options={"jointly": True, "epochs": 3, "batch": 50, "optimizer": "adam", "lr": 0.05}
    ),
    "sensitivity": Setting(
        "training",
        2400,
        options={"epochs": 1, "batch": 32, "holdout": 0, "window": 5, "beta_every": 4, "keep": 0.5},
    ),
}
# share of the MACs that is kept; a half leaves nothing of an untrained MobileNetV2
TARGETS = {"resnet20": 0.5, "resnet56": 0.5, "mobilenetv2": 0.9, "mobilenetv2_half": 0.5}
# global: channels of all groups are ranked together, and a group loses at most 90 %
SCOPES: dict[str, dict[str, Any]] = {"local": {}, "global": {"scope": "global", "max_ratio": 0.9}}


def base_of(network: str) -> str:
    """The pretrained network that a name of the study means: ``mobilenetv2_half`` is cut further."""
    return network.removesuffix("_half")


def method_of(row: str) -> str:
    """The method that a row of the study runs."""
    return SETTINGS[row].method or row
