"""From stored images to RGB pixels: ``data.decoder`` pillow, torchvision or simplejpeg.

All of them give the same pixels. The two others decode plain JPEG files alone (three colours, upright). Everything else
(another format, grayscale, CMYK, a rotated photograph) and every file that they do not take goes to Pillow, which alone
decides what cannot be read. simplejpeg also leaves files to Pillow that a decoder can only repair; torchvision repairs
them without a word, by the rules of its own libjpeg.
"""

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from dist_prune.data.random_access import StoredImage
from dist_prune.errors import PruneError

ORIENTATION = 0x0112  # EXIF tag
DIVISORS = (8, 4, 2)  # of the sides, at which a JPEG file can be decoded without decoding all of it
Divisor = Callable[[int, int], int]  # (height, width) of a stored image -> 1, 2, 4 or 8


class Decoded(NamedTuple):
    """An image in RGB.

    Attributes:
        image: 8-bit RGB, as an image of Pillow or as (H, W, 3) uint8 pixels.
        height: of the stored image in pixels, upright; that of ``image`` is smaller if it was decoded at a fraction.
        width: the same.
    """

    image: Image.Image | np.ndarray
    height: int
    width: int


def read_image(stored: StoredImage, exif: bool = True) -> Image.Image:
    """Decode an image to 8-bit RGB with Pillow.

    Grayscale, palette, CMYK and alpha images are converted as Pillow does. 16-bit grayscale keeps its upper 8 bits.

    Args:
        stored: path of an image file, the bytes of one, or (H, W, 3) uint8 pixels.
        exif: turn a photograph upright by its EXIF orientation.

    Raises:
        ValueError: the file is missing or damaged, or its pixels have no meaning in 8 bits.
    """
    image = decode(stored, exif).image
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def decode(stored: StoredImage, exif: bool = True, decoder: str = "pillow", divisor: Divisor | None = None) -> Decoded:
    """Decode an image to 8-bit RGB.

    Args:
        stored: path of an image file, the bytes of one, or (H, W, 3) uint8 pixels.
        exif: turn a photograph upright by its EXIF orientation.
        decoder: the recipe's ``data.decoder``.
        divisor: by how much a plain JPEG file's sides may be divided in decoding, which changes pixels. None: not.

    Raises:
        ValueError: the file is missing or damaged, or its pixels have no meaning in 8 bits.
    """
    try:
        if isinstance(stored, np.ndarray):
            if stored.dtype != np.uint8 or stored.ndim != 3 or stored.shape[2] != 3:
                raise ValueError(f"it is {stored.dtype} {stored.shape}, not uint8 (height, width, 3)")
            return Decoded(stored, *stored.shape[:2])
        if (
            isinstance(stored, Path) and stored.exists() and not stored.is_file()
        ):  # opening a FIFO would wait for its writer
            raise ValueError("it is not a regular file")
        if decoder != "pillow" and isinstance(stored, Path):
            stored = stored.read_bytes()
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as file:
            turned = exif and "exif" in file.info and file.getexif().get(ORIENTATION, 1) != 1
            height, width = file.height, file.width
            if file.format == "JPEG" and file.mode == "RGB" and not turned:
                by = divisor(height, width) if divisor is not None else 1
                if decoder != "pillow" and isinstance(stored, bytes):
                    pixels = _decode_plain(stored, decoder, height, width, by)
                    if pixels is not None:
                        return Decoded(pixels, height, width)
                if by > 1:
                    file.draft("RGB", (width // by, height // by))
                file.load()  # a conversion would copy it
                return Decoded(file, height, width)
            image = _to_rgb(ImageOps.exif_transpose(file) if turned else file)
            return Decoded(image, image.height, image.width)
    except FileNotFoundError as error:
        raise ValueError("it no longer exists") from error
    except Exception as error:  # decoders raise many types on a damaged file
        raise ValueError(str(error) or repr(error)) from error


def check_decoder(decoder: str) -> None:
    """Check that a decoder can be used.

    Args:
        decoder: the recipe's ``data.decoder``.

    Raises:
        PruneError: its package is missing.
    """
    if decoder == "simplejpeg":
        _simplejpeg()


def divisor_for(side: int, height: int, width: int) -> int:
    """The largest divisor of an image's sides that leaves both at least as long as a resize needs them.

    Args:
        side: in pixels, to which ``height`` and ``width`` are resized.
        height: of the image or of its window, in pixels.
        width: the same.
    """
    return next((by for by in DIVISORS if min(height, width) >= side * by), 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _convert_16_bit(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, not 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGB":  # a conversion would copy it
        image.load()
        return image
    return image.convert("RGB")


def _convert_16_bit(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() >= 2**16:
        raise ValueError("its pixels have 32 bits, not 8 or 16")
    return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")


def _decode_plain(content: bytes, decoder: str, height: int, width: int, by: int) -> np.ndarray | None:
    """(H, W, 3) uint8 pixels of a JPEG file; None if the decoder does not take it."""
    try:
        if decoder == "torchvision":
            stored = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            decoded = cast(Tensor, decode_jpeg(stored, mode=ImageReadMode.RGB))
            pixels = decoded.permute(1, 2, 0).numpy()
        else:
            least = (-(-height // by), -(-width // by)) if by > 1 else (0, 0)
            pixels = _simplejpeg().decode_jpeg(content, "RGB", min_height=least[0], min_width=least[1])
    except PruneError:
        raise
    except Exception:  # it says so by many types; Pillow decides
        return None
    return pixels if pixels.shape == (-(-height // by), -(-width // by), 3) else None


def _simplejpeg() -> ModuleType:
    try:
        import simplejpeg
    except (ImportError, OSError) as error:
        raise PruneError(
            "data.decoder: 'simplejpeg' needs its package: pip install 'dist-prune[decoders]'; or write "
            "data.decoder=torchvision or leave the key out, which gives the same pixels"
        ) from error
    return simplejpeg
