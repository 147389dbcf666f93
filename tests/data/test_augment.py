"""Augmentation: what it may do to an image, and that it follows the sample."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as vision

from dist_prune.data import augment
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.timm_transforms import AutoAugmentPolicy, check_policy
from dist_prune.errors import PruneError

CPU, IDS = torch.device("cpu"), np.array([5, 9, 700, 2, 41, 999])


def look(**more) -> TransformConfig:
    return TransformConfig(8, (0.0,), (1.0,), **more)


def feed(backend: str = "auto", **more) -> ImageLoader:
    return ImageLoader(open_source("digits", None, "", True), look(**more), CPU, backend=backend)


KINDS = {
    "crop": {"augment": "crop"},
    "crop_flip": {"augment": "crop_flip"},
    "window": {"augment": "resized_crop_flip"},
    "resized": {"augment": "crop", "schedule": ((0, 12),)},
    "rand": {"augment": "crop", "auto_augment": "rand-m9-n3-mstd0.5-inc1"},
    "original": {"auto_augment": "original-mstd0.5"},
    "augmix": {"auto_augment": "augmix-m5-w4-d2"},
    "erased": {"augment": "crop_flip", "erasing": 1.0},
    "colour": {"erasing": 0.5, "erasing_mode": "rand"},
    "zeros": {"erasing": 0.5, "erasing_mode": "const"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_follows_the_sample_not_the_batch(kind):
    found = feed(**KINDS[kind])
    together = next(found.batches([IDS], (0, 3))).images
    alone = torch.cat([batch.images for batch in found.batches([IDS[i : i + 1] for i in range(len(IDS))], (0, 3))])
    assert torch.equal(together, alone)
    assert torch.equal(together, next(feed("torch", **KINDS[kind]).batches([IDS], (0, 3))).images)
    assert not torch.equal(together, next(found.batches([IDS], (0, 4))).images)
    assert not torch.equal(together, next(found.batches([IDS], (1, 3))).images)
    plain = next(feed().batches([IDS])).images
    assert torch.equal(next(found.batches([IDS])).images, plain), "evaluation knows nothing of it"


def test_policies_leave_the_global_random_states_alone():
    import random

    random.seed(1)
    np.random.seed(1)
    wanted = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    policy = AutoAugmentPolicy(TransformConfig(8, (0.5,) * 3, (0.5,) * 3, auto_augment="rand-m9-mstd0.5"), 8)
    results = {policy(image, 7).tobytes() for _ in range(3)}
    assert len(results) == 1
    assert len({policy(image, number).tobytes() for number in range(20)}) > 5
    assert (random.random(), np.random.rand()) == wanted


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("randm9", "begins with none of rand, augmix"),
        ("rand-m9-x3", "timm's 'rand' knows no x3"),
        ("rand-mstd", "timm's 'rand' knows no mstd"),
        ("original-m9", "timm's 'original' knows no m9"),
        ("augmix-w4-n2", "timm's 'augmix' knows no n2"),
    ],
)
def test_policies_that_timm_would_not_understand(config, said):
    with pytest.raises(PruneError, match=said):
        check_policy(config)


@pytest.mark.parametrize("config", ["rand-m9-mstd0.5", "rand-m6-n4-mmax15-inc1-tweights", "v0r", "3a", "augmix-m5-w4"])
def test_policies_that_timm_understands(config):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    policy = AutoAugmentPolicy(TransformConfig(32, (0.5,) * 3, (0.5,) * 3, auto_augment=config), 32)
    assert any(policy(image, number).tobytes() != image.tobytes() for number in range(8))


def test_erasing_takes_the_share_and_the_area_that_it_says():
    n = 2000
    images = torch.full((n, 3, 24, 32), 5.0)
    found = augment.erase(images.clone(), (0, 0), np.arange(n), look(erasing=0.4, erasing_mode="const"))
    gone = (found == 0).all(1)
    touched = gone.flatten(1).any(1)
    assert 0.35 < float(touched.float().mean()) < 0.45
    area = gone.flatten(1).float().mean(1)[touched]
    assert float(area.min()) > 0.01
    assert float(area.max()) < 0.36
    assert torch.equal(gone, (found != 5).any(1)), "one rectangle, all channels"
    one = gone[touched][0]
    assert int(one.any(0).sum()) * int(one.any(1).sum()) == int(one.sum())
    noise = augment.erase(images.clone(), (0, 0), np.arange(n), look(erasing=0.4))
    assert torch.equal((noise != 5).any(1), gone), "the same rectangles in every mode"
    values = noise[(noise != 5)]
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1) < 0.02


@pytest.mark.parametrize(("height", "width"), [(20, 30), (5, 200), (200, 5), (1, 1)])
def test_windows_lie_inside_and_have_the_area_and_aspect_asked_for(height, width):
    scale, ratio = (0.3, 0.6), (0.8, 1.25)
    areas = []
    for chance in augment.window_uniforms((0, 0), np.arange(300)):
        top, left, h, w = augment.crop_window(height, width, chance, scale, ratio)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert h >= 1
        assert w >= 1
        areas.append(h * w / (height * width))
    if (height, width) == (20, 30):
        assert 0.25 < min(areas) < 0.35
        assert 0.55 < max(areas) < 0.65


def test_windows_of_arrays_are_resized_as_pillow_resizes(data):
    """The batched triangle filter against Pillow's bilinear on real photographs: at most one step of 255 apart."""
    source = open_source("npz", str(data / "cifar10.npz"), "", True)
    ids = np.arange(64)
    pixels = torch.from_numpy(source.images[ids]).permute(0, 3, 1, 2)  # type: ignore[index]
    wanted = TransformConfig(32, (0.0,) * 3, (1.0,) * 3)
    for size in (16, 32, 48):
        found = augment.resize_windows(pixels, (3, 1), ids, wanted, size)
        chances = augment.window_uniforms((3, 1), ids)
        for image, chance, result in zip(pixels, chances, found, strict=True):
            box = augment.crop_window(32, 32, chance, wanted.scale, wanted.ratio)
            reference = vision.resized_crop(vision.to_pil_image(image), *box, [size, size])  # type: ignore[arg-type]
            reference = vision.hflip(reference) if chance[-1] < 0.5 else reference
            difference = (vision.pil_to_tensor(reference).int() - result.int()).abs()  # type: ignore[arg-type]
            assert int(difference.max()) <= 1


def test_the_schedule_of_sizes():
    found = feed(augment="crop", schedule=((0, 6), (2, 7), (3, 8)))
    sides = [next(found.batches([IDS], (0, epoch))).images.shape[-1] for epoch in range(5)]
    assert sides == [6, 6, 7, 8, 8]
    assert next(found.batches([IDS])).images.shape[-1] == 8


def test_what_a_backend_cannot_do_is_refused():
    with pytest.raises(PruneError, match="data.auto_augment: 'rnd-m9' begins with none of .* Did you mean 'rand'"):
        feed(auto_augment="rnd-m9")


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_layout_asked_for(layout, data):
    source = open_source("npz", str(data / "cifar10.npz"), "", False)
    plain = ImageLoader(source, TransformConfig(32, (0.5,) * 3, (0.2,) * 3), CPU, memory_format=layout)
    images = next(plain.batches([np.arange(4)])).images
    assert images.is_contiguous(memory_format=layout)
    pixels = torch.from_numpy(source.images[:4]).permute(0, 3, 1, 2)  # type: ignore[index]
    by_hand = (pixels.float() - 255 * torch.tensor(0.5)) / (255 * torch.tensor(0.2))
    assert torch.equal(images, by_hand)


def test_noise_is_drawn_on_the_cpu_from_the_image_s_number():
    """A device's own generator gives other numbers: erased images would hang on the machine."""
    images = torch.zeros(3, 2, 16, 16)
    for mode, shape in (("rand", (2, 1, 1)), ("pixel", None)):
        found = augment.erase(images.clone(), (4, 1), np.arange(3), look(erasing=1.0, erasing_mode=mode))
        chance = augment.uniform_from_ids(4, 1, np.arange(3), 2 * augment.TRIES + 4, augment.ERASE).numpy()
        for image in range(3):
            rows, columns = (found[image].abs().sum((0, axis)).nonzero()[:, 0] for axis in (2, 1))
            erased = found[image][:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            generator = torch.Generator().manual_seed(int(chance[image, -4] * 2**53))
            wanted = torch.randn(shape or erased.shape, generator=generator)
            assert torch.equal(erased, wanted.expand_as(erased))


def test_no_generator_of_random_numbers_lives_on_a_device():
    """What a run draws is the same on every device; dropout's masks alone are the device's own."""
    for file in sorted((Path(__file__).resolve().parents[2] / "dist_prune").rglob("*.py")):
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            assert not re.search(r"torch\.Generator\([^)]", line), f"{file}:{number}: {line.strip()}"
            drawn = re.search(r"torch\.(rand|randn|randint|randperm|bernoulli|normal)\(.*device=", line)
            assert not drawn, f"{file}:{number}: {line.strip()}"
