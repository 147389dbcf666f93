"""Real ImageNet images through a real network: the accuracy that comes with the weights, and timm's pixels."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from dist_prune import models as backbones
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.models.torchvision_weights import translate_names
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker

CPU, HALF = torch.device("cpu"), (0.5, 0.5, 0.5)


def mobilenet(data):
    model = backbones.create("mobilenetv2_100", 1000, 3)
    weights = tensor_files.read_weights(data / "weights" / "mobilenetv2_imagenet_rot180.safetensors")
    tensor_files.load_strictly(model, translate_names(weights, model.state_dict()), "the weights")
    return model


def share(ranks: Communicator, data) -> dict[str, float]:
    source = open_source("imagefolder", str(data / "imagenet_1000_rot180"), "val", False)
    feed = ImageLoader(source, TransformConfig(224, HALF, HALF, 0.875), CPU)
    return evaluate(mobilenet(data), feed, 50, ranks, Tracker(False))


@pytest.mark.slow
def test_mobilenetv2_on_1000_images_two_ranks(data, pool):
    """87.1 / 97.6 % are the figures that come with the weights."""
    for found in pool.run(2, share, data):
        assert found["images"] == 1000
        assert found["top1"] == pytest.approx(87.1, abs=0.1)
        assert found["top5"] == pytest.approx(97.6, abs=0.1)


def test_translated_weights_are_timm_s_network(data):
    """The same function as torchvision's own network with the same weights; others are left alone."""
    from torchvision.models import mobilenet_v2

    raw = tensor_files.read_weights(data / "weights" / "mobilenetv2_imagenet_rot180.safetensors")
    theirs = mobilenet_v2().eval()
    theirs.load_state_dict(raw)
    images = torch.randn((2, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(mobilenet(data).eval()(images), theirs(images), atol=1e-4)
    assert translate_names(raw, timm.create_model("resnet18").state_dict()) is raw


@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet50", "vit_base_patch16_siglip_224", "efficientnet_b0"])
def test_the_evaluation_transform_is_timm_s(data, name):
    """Pixels equal those of timm's create_transform for the network's pretrained configuration, on real JPEGs."""
    model = torch.nn.Module()
    model.pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()  # type: ignore[assignment, union-attr]
    config = backbones.image_config(model, 3)
    source = open_source("imagefolder", str(data / "imagenet_1000"), "val", False)
    size = config["input_size"][1]
    look = TransformConfig(
        size, config["mean"], config["std"], config["crop_pct"], config["interpolation"], crop_mode=config["crop_mode"]
    )
    ids = np.array([3, 500, 999, 120])
    batch = next(ImageLoader(source, look, CPU, dtype=torch.float64).batches([ids]))
    transform = create_transform(
        config["input_size"], is_training=False, use_prefetcher=True, interpolation=config["interpolation"],
        crop_pct=config["crop_pct"], crop_mode=config["crop_mode"], mean=config["mean"], std=config["std"],
    )  # fmt: skip
    mean, std = (torch.tensor(config[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std"))
    for number, image in zip(ids, batch.images, strict=True):
        with Image.open(source.paths[number]) as file:  # type: ignore[union-attr]
            wanted = torch.as_tensor(np.asarray(transform(file.convert("RGB"))))
        assert torch.equal((255 * (image * std + mean)).round().to(torch.uint8), wanted)
