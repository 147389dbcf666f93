"""Decoders: the same pixels and the same refusals as Pillow's, on photographs and on strange and damaged files."""

import builtins
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dist_prune.config.data import Data
from dist_prune.data import decoders
from dist_prune.data.datasets import open_source
from dist_prune.data.decoders import decode, divisor_for, read_image
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.errors import PruneError

CPU, RNG = torch.device("cpu"), np.random.default_rng(0)
FAST = ["torchvision", "simplejpeg"]
PIXELS = np.kron(RNG.integers(0, 256, (9, 7, 3), np.uint8), np.ones((11, 13, 1), np.uint8))  # (99, 91, 3)


@pytest.fixture(params=FAST)
def decoder(request) -> str:
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    return request.param


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(stored, decoder: str, **options) -> np.ndarray:
    return np.asarray(decode(stored, decoder=decoder, **options).image)


def outcome(stored: bytes, decoder: str) -> bytes | None:
    try:
        return pixels(stored, decoder).tobytes()
    except ValueError:
        return None


def fast_calls(monkeypatch) -> list[str]:
    """The decoders that were used on a plain JPEG file, and that took it."""
    calls, original = [], decoders._decode_plain

    def noted(content, decoder, *more):
        found = original(content, decoder, *more)
        calls.extend([decoder] if found is not None else [])
        return found

    monkeypatch.setattr(decoders, "_decode_plain", noted)
    return calls


def test_photographs_have_pillows_pixels(data, decoder, monkeypatch):
    files = sorted(file for file in (data / "imagenet_1000" / "val").rglob("*.*"))[:100]
    assert len(files) == 100
    calls = fast_calls(monkeypatch)
    for file in files:
        for stored in (file, file.read_bytes()):
            assert np.array_equal(pixels(stored, decoder), np.asarray(read_image(file)))
    assert len(calls) > 190, "most photographs are plain JPEG files"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 5}])
def test_kinds_of_plain_jpeg_files(decoder, options, monkeypatch):
    calls = fast_calls(monkeypatch)
    for side in (99, 98, 1):
        stored = encoded(Image.fromarray(PIXELS[:side]), **options)
        assert np.array_equal(pixels(stored, decoder), pixels(stored, "pillow"))
    assert calls == [decoder] * 3


def test_all_other_files_are_pillows(decoder, monkeypatch, tmp_path):
    image, calls = Image.fromarray(PIXELS), fast_calls(monkeypatch)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "gray": encoded(image.convert("L")),
        "cmyk": encoded(image.convert("CMYK")),
        "turned": encoded(image, exif=turned),
        "png": encoded(image, "PNG"),
        "alpha": encoded(image.convert("RGBA"), "PNG"),
        "webp": encoded(image, "WEBP"),
        "gif": encoded(image, "GIF"),
        "many": encoded(image, "MPO", save_all=True, append_images=[image]),
    }
    for name, stored in files.items():
        found = pixels(stored, decoder)
        assert found.shape == ((91, 99, 3) if name == "turned" else (99, 91, 3))
        assert np.array_equal(found, np.asarray(read_image(stored)))
    assert calls == []
    assert pixels(files["turned"], decoder, exif=False).shape == (99, 91, 3) and calls == [decoder]
    with pytest.raises(ValueError, match="no longer exists"):
        decode(tmp_path / "gone.jpg", decoder=decoder)


def test_damage_is_judged_by_pillow_alone(decoder):
    """Cut short, bytes altered, bytes added: refused where Pillow refuses, else Pillow's pixels.

    torchvision tells of no repair, so what its libjpeg makes of bad codes is its own.
    """
    whole = encoded(Image.fromarray(PIXELS), quality=90)
    damaged = [whole[:end] for end in range(0, len(whole), 97)] + [whole + b"more", whole[:-2] + b"\0\0\xff\xd9"]
    for seed in range(150):
        content = bytearray(whole)
        rng = np.random.default_rng(seed)
        for place in rng.integers(2, len(whole), 1 + seed % 3):
            content[place] = rng.integers(256)
        damaged.append(bytes(content))
    outcomes = [(outcome(content, "pillow"), outcome(content, decoder)) for content in damaged]
    assert {pillow is None for pillow, _ in outcomes} == {True, False}
    assert [pillow is None for pillow, _ in outcomes] == [other is None for _, other in outcomes]
    assert sum(pillow != other for pillow, other in outcomes) <= (3 if decoder == "torchvision" else 0)


def test_a_loader_has_the_same_images_with_each_decoder(decoder, tmp_path):
    for number in range(6):
        place = tmp_path / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(RNG.integers(0, 256, (40 + number, 50, 3), np.uint8))
        (place / f"{number}.jpg").write_bytes(encoded(image if number else image.convert("L")))
    source = open_source("imagefolder", str(tmp_path), "train", True)
    for augment in ("resized_crop_flip", "crop_flip"):
        batches = [
            next(ImageLoader(source, look, CPU, workers).batches([np.arange(6)], key)).images
            for key in (None, (0, 1))
            for look, workers in (
                (TransformConfig(16, (0.5,) * 3, (0.5,) * 3, 0.875, augment=augment), 0),
                (TransformConfig(16, (0.5,) * 3, (0.5,) * 3, 0.875, augment=augment, decoder=decoder), 0),
            )
        ]
        assert torch.equal(batches[0], batches[1]) and torch.equal(batches[2], batches[3])


def test_decoding_at_a_fraction_only_where_asked_and_enough():
    assert [divisor_for(16, *sides) for sides in ((31, 99), (32, 99), (64, 64), (127, 127), (900, 128))] == [
        1,
        2,
        4,
        4,
        8,
    ]
    photograph = Image.fromarray(PIXELS[::11, ::13]).resize((182, 198), Image.Resampling.BICUBIC)
    stored = encoded(photograph)
    for by, shape in ((1, (198, 182, 3)), (2, (99, 91, 3)), (4, (50, 46, 3)), (8, (25, 23, 3))):
        found = decode(stored, divisor=lambda height, width, by=by: by)
        assert (np.asarray(found.image).shape, found.height, found.width) == (shape, 198, 182)
        small = np.asarray(photograph.resize((shape[1], shape[0]), Image.Resampling.BOX)).astype(float)
        assert np.abs(np.asarray(found.image) - small).mean() < 6
    pytest.importorskip("simplejpeg")
    for by in (1, 2, 4, 8):
        one, other = (pixels(stored, name, divisor=lambda *_, by=by: by) for name in ("pillow", "simplejpeg"))
        assert one.shape == other.shape and np.abs(one.astype(int) - other).mean() < 3
    png = encoded(photograph, "PNG")
    assert np.asarray(decode(png, divisor=lambda *_: 8).image).shape == (198, 182, 3), "only JPEG files have fractions"


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_images_at_a_fraction_are_close_to_the_whole_ones(decoder, tmp_path):
    """Windows are drawn on the stored size, so the same part of the photograph is seen."""
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    rows, columns = np.mgrid[0:256, 0:320]
    for number in range(4):
        place = tmp_path / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        smooth = np.stack([rows * 0.9, columns * 0.7, 40 * number + 0 * rows], 2).astype(np.uint8)
        (place / f"{number}.jpg").write_bytes(encoded(Image.fromarray(smooth), quality=95))
    source = open_source("imagefolder", str(tmp_path), "train", True)
    looks = [
        TransformConfig(32, (0.0,) * 3, (1.0,) * 3, 0.875, augment="resized_crop_flip", decoder=name, dct_scaled=scaled)
        for name, scaled in (("pillow", False), (decoder, True))
    ]
    for key in (None, (0, 1), (0, 2)):
        whole, part = (next(ImageLoader(source, look, CPU).batches([np.arange(4)], key)).images for look in looks)
        assert 0 < 255 * (whole - part).abs().mean() < 3


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="data.decoder is for image files .*data.source is digits"):
        Data(source="digits", decoder="torchvision")
    with pytest.raises(ValueError, match="data.dct_scaled is for image files .* a mask needs its image's size"):
        Data(source="maskfolder", root="x", dct_scaled=True)
    with pytest.raises(ValueError, match="torchvision decodes at the full size alone"):
        Data(source="tar", root="x", decoder="torchvision", dct_scaled=True)
    original = builtins.__import__
    monkeypatch.delitem(sys.modules, "simplejpeg", raising=False)

    def absent(name, *more):
        if name == "simplejpeg":
            raise ImportError("no such package")
        return original(name, *more)

    monkeypatch.setattr(builtins, "__import__", absent)
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "b").mkdir()
    for name in "ab":
        (tmp_path / "train" / name / "1.jpg").write_bytes(encoded(Image.fromarray(PIXELS)))
    source = open_source("imagefolder", str(tmp_path), "train", True)
    with pytest.raises(PruneError, match=r"'simplejpeg' needs its package: pip install 'dist-prune\[decoders\]'"):
        ImageLoader(source, TransformConfig(16, (0.5,) * 3, (0.5,) * 3, decoder="simplejpeg"), CPU)


def test_the_ffcv_backend_decodes_by_itself(ffcv, tmp_path):
    from dist_prune.cli.main import main
    from dist_prune.data.ffcv.backend import open_beton

    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.jpg").write_bytes(encoded(Image.fromarray(PIXELS)))
    assert main(["make-ffcv", "--source", str(tmp_path), "--split", "train", "--write-mode", "raw"]) == 0
    with pytest.raises(PruneError, match="data.decoder: the ffcv backend decodes by itself"):
        look = TransformConfig(16, (0.5,) * 3, (0.5,) * 3, decoder="torchvision")
        ImageLoader(open_beton(tmp_path / "train.beton"), look, CPU)
