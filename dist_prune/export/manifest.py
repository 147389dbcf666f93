"""The schema of bundle.json: the types and plausible sizes of its fields. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dist_prune.errors import PruneError, shown

Name = Annotated[str, Field(max_length=1000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Pair = Annotated[list[Number], Field(min_length=2, max_length=2)]


Side = Annotated[int, Field(ge=1, le=16384)]


class Strict(BaseModel):
    """Base of the schema: JSON types without conversion; fields that a later version adds are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class DenseNetwork(Strict):
    """The dense network."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    kwargs: dict[str, Any]
    num_classes: int = Field(ge=1, le=10**6)
    in_chans: int = Field(ge=1, le=1024)


class Image(Strict):
    """The evaluation transform, and the augmentation of the training images (see ``TransformConfig``)."""

    model_config = ConfigDict(strict=True, extra="forbid")

    size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)]
    mean: list[Number] = Field(max_length=1024)
    std: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(max_length=1024)
    crop: float = Field(default=1.0, gt=0, le=1)
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    augment: Literal["none", "crop", "crop_flip", "resized_crop_flip"] = "none"
    crop_mode: Literal["center", "squash", "border"] = "center"
    exif: bool = True
    scale: Pair = Field(default=[0.08, 1.0])
    ratio: Pair = Field(default=[3 / 4, 4 / 3])
    auto_augment: Name | None = None
    erasing: float = Field(default=0.0, ge=0, le=1)
    erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    schedule: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(default=[])
    padding: int | None = Field(default=None, ge=0, le=16384)
    decoder: Literal["pillow", "torchvision", "simplejpeg"] = "pillow"
    dct_scaled: bool = False
    augment_on: Literal["host", "device"] = "host"
    resizer: Literal["pillow", "torch"] = "pillow"


class Figures(Strict):
    """The measured figures of one network, MACs, parameters. Other figures may be added."""

    top1: Number | None = None
    macs: int | None = None
    params: int | None = None


class Origin(Strict):
    """The origin of the network, for a reader."""

    recipe: Name
    method: Name
    paper: Name
    seed: int
    data: Name
    finetune_epochs: int


class Manifest(Strict):
    """The body of bundle.json."""

    backbone: DenseNetwork
    plan: dict[str, Any]
    image: Image
    classes: list[Name] = Field(max_length=10**6)
    figures: dict[str, Figures] = Field(default={})
    origin: dict[str, Any] = Field(default={})
    weights_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    versions: dict[Name, Name | None] = Field(default={})
    task: dict[str, Any] | None = None
    outputs: dict[Name, list[Annotated[int, Field(ge=0, le=2**31)]]] | None = None
    signature: dict[Name, list[Annotated[int, Field(ge=0, le=2**40)]]] | None = None

    @model_validator(mode="after")
    def _agree(self):
        spec, image = self.backbone, self.image
        if len(self.classes) != spec.num_classes:
            raise ValueError(f"classes: {len(self.classes)} names for {spec.num_classes} outputs of the network")
        for key in ("mean", "std"):
            if len(getattr(image, key)) != spec.in_chans:
                raise ValueError(f"image.{key}: one number for each of the {spec.in_chans} channels")
        if self.origin:
            Origin.model_validate(self.origin)
        return self


def check(body: Any, where: str) -> None:
    """Check the body of a bundle.json against the schema.

    Args:
        body: The parsed JSON.
        where: Name of the file, for the error.

    Raises:
        PruneError: A line for each field that is missing, has another type or an implausible size (8 at most).
    """
    try:
        Manifest.model_validate(body)
    except ValidationError as error:
        lines = [
            f"  - {'.'.join(str(step)[:60] for step in item['loc']) or 'the whole'}: {item['msg'][:300]}"
            + ("" if isinstance(item["input"], dict | BaseModel) else f" (got {shown(item['input'])})")
            for item in error.errors()[:8]
        ]
        raise PruneError(f"{where} is damaged, or belongs to no bundle:\n" + "\n".join(lines)) from error
