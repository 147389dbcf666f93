"""Pillow's resize, bit for bit, compiled: what FFCV's reader does with a decoded image.

FFCV's own resize is OpenCV's area average, which no other loader has: a network would see other pixels through
another backend. This is the two-pass fixed-point resampling of Pillow (src/libImaging/Resample.c: coefficients with 22
fractional bits, 8 bits between the passes) for the window of the result that is wanted. Which pass comes first
changes the rounding: Pillow 13 does the vertical one first where the height shrinks by more than twice what the width
shrinks by, older ones never do; the installed one is asked.
"""

import math

import numpy as np
from numba import njit
from PIL import Image

KINDS = {"nearest": 0, "bilinear": 1, "bicubic": 2}
BITS = 22
HALF = 1 << (BITS - 1)
# compiled for a caller with fastmath (FFCV's), a function would inherit that: other roundings, kept on the disk
exact = njit(nogil=True, cache=True, fastmath=False)


@exact
def _weight(kind: int, x: float) -> float:
    x = abs(x)
    if kind == 1:
        return 1.0 - x if x < 1.0 else 0.0
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@exact
def _taps(length: int, resized: int, start: int, count: int, kind: int):
    """Which of ``length`` samples make up samples ``start`` to ``start + count`` of ``resized``, and how much of each.

    Returns:
        first (count,) and how many (count,) source samples; weights (count, most) in units of 2**-22.
    """
    scale = length / resized
    first, many = np.empty(count, np.int32), np.empty(count, np.int32)
    if kind == 0:
        weights = np.full((count, 1), 1 << BITS, np.int32)
        place = scale * 0.5  # added up step by step: so does Pillow, and ties fall the same way
        for i in range(start + count):
            if i >= start:
                first[i - start], many[i - start] = min(int(place), length - 1), 1
            place += scale
        return first, many, weights
    stretch = max(scale, 1.0)
    support = (1.0 if kind == 1 else 2.0) * stretch
    weights = np.zeros((count, math.ceil(support) * 2 + 1), np.int32)
    row = np.empty(weights.shape[1])
    for i in range(count):
        centre = (i + start + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), length)
        total = 0.0
        for k in range(high - low):
            row[k] = _weight(kind, (k + low - centre + 0.5) * (1.0 / stretch))
            total += row[k]
        for k in range(high - low):
            share = row[k] / total if total != 0.0 else row[k]
            weights[i, k] = int(share * (1 << BITS) + (0.5 if share >= 0 else -0.5))
        first[i], many[i] = low, high - low
    return first, many, weights


@exact
def _byte(value: int) -> int:
    return min(max(value >> BITS, 0), 255)


@exact
def _across(source, top, left, taps, mirror, out):
    """Horizontal pass: rows ``top`` .. of ``source`` (H, W, 3), as many as ``out`` (n, size, 3) has."""
    first, many, weights = taps
    size = out.shape[1]
    for y in range(out.shape[0]):
        line = source[top + y]
        for x in range(size):
            red = green = blue = HALF
            for k in range(many[x]):
                weight, place = weights[x, k], left + first[x] + k
                red += weight * line[place, 0]
                green += weight * line[place, 1]
                blue += weight * line[place, 2]
            pixel = out[y, size - 1 - x if mirror else x]
            pixel[0], pixel[1], pixel[2] = _byte(red), _byte(green), _byte(blue)


@exact
def _down(source, top, left, taps, out):
    """Vertical pass: columns ``left`` .. of ``source`` (H, W, 3), as many as ``out`` (size, n, 3) has."""
    first, many, weights = taps
    width = 3 * out.shape[1]
    total = np.empty(width, np.int32)
    for y in range(out.shape[0]):
        total[:] = HALF
        for k in range(many[y]):
            weight = weights[y, k]
            line = source[top + first[y] + k].reshape(-1)[3 * left : 3 * left + width]
            for x in range(width):
                total[x] += weight * line[x]
        target = out[y].reshape(-1)
        for x in range(width):
            target[x] = _byte(total[x])


@exact
def _reach(taps):
    """The first sample that is needed, and the one behind the last."""
    first, many, _ = taps
    return first.min(), (first + many).max()


@exact
def resample(image, box, resized, window, kind, vertical_first, mirror, out):
    """Cut a box out of ``image`` (H, W, 3) uint8, resize it, write a window of the result to ``out``.

    Args:
        box: (top, left, height, width); nothing outside it is looked at.
        resized: (rows, columns) that the box gets.
        window: (top, left) of the part of the resized box that is wanted.
        kind: a value of KINDS.
        vertical_first: whether the installed Pillow ever does the vertical pass first (VERTICAL_FIRST).
        mirror: write the window mirrored left to right.
        out: (size, size, 3) uint8, C-contiguous; its size is the window's.
    """
    top, left, height, width = box
    rows, columns = resized
    size = out.shape[0]
    vertical = _taps(height, rows, window[0], size, kind)
    horizontal = _taps(width, columns, window[1], size, kind)
    if vertical_first and height > rows and 2 * (width - columns) < height - rows:
        begin, end = _reach(horizontal)
        middle = np.empty((size, end - begin, 3), np.uint8)
        _down(image, top, left + begin, vertical, middle)
        _across(middle, 0, -begin, horizontal, mirror, out)
    else:
        begin, end = _reach(vertical)
        middle = np.empty((end - begin, size, 3), np.uint8)
        _across(image, top + begin, left, horizontal, mirror, middle)
        _down(middle, -begin, 0, vertical, out)


@exact
def render(image, row, kind, vertical_first, out):
    """``resample`` with what ``centred`` or ``drawn`` found for the image."""
    box, resized, window = (row[0], row[1], row[2], row[3]), (row[4], row[5]), (row[6], row[7])
    resample(image, box, resized, window, kind, vertical_first, row[8] != 0, out)


@exact
def blank(height, width):
    """(height, width, 3) uint8, not filled."""
    return np.empty((height, width, 3), np.uint8)


@exact
def unpack(data, image):
    """Copy raw pixels (n,) into an image; 0, or 1 where their number is wrong."""
    flat = image.reshape(-1)
    if len(flat) != len(data):
        return 1
    for i in range(len(flat)):
        flat[i] = data[i]
    return 0


@exact
def centre_windows(sides, size, short):
    """Windows of the evaluation look: the shorter side is resized to ``short``, the centre cut out.

    The roundings are torchvision's (Resize, CenterCrop).

    Args:
        sides: (n, 2) height and width.
        size: of the square that is cut out.

    Returns:
        (n, 9) int32: box (top, left, height, width), its new (rows, columns), window (top, left), mirrored.
    """
    found = np.zeros((len(sides), 9), np.int32)
    for i in range(len(sides)):
        height, width = sides[i]
        rows = short if height <= width else int(short * height / width)
        columns = short if width <= height else int(short * width / height)
        found[i, 2:] = (height, width, rows, columns, round((rows - size) / 2.0), round((columns - size) / 2.0), 0)
    return found


@exact
def random_windows(sides, chances, scale, ratio, size):
    """Windows of training images, resized to a square: the same as ``augment.window`` finds, see ``centred``.

    Args:
        sides: (n, 2) height and width.
        chances: (n, 2 * tries + 3) as ``augment.window_chances`` gives them.
        scale, ratio: area share and aspect, (lowest, highest).
    """
    found = np.zeros((len(sides), 9), np.int32)
    low, high, tries = math.log(ratio[0]), math.log(ratio[1]), (chances.shape[1] - 3) // 2
    for i in range(len(sides)):
        (height, width), chance = sides[i], chances[i]
        top, left, h, w = 0, 0, 0, 0
        for number in range(tries):
            area = height * width * (scale[0] + chance[number] * (scale[1] - scale[0]))
            aspect = math.exp(low + chance[tries + number] * (high - low))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(chance[2 * tries] * (height - h + 1)), int(chance[2 * tries + 1] * (width - w + 1))
                break
        else:
            aspect = min(max(width / height, ratio[0]), ratio[1])
            w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
            top, left = (height - h) // 2, (width - w) // 2
        found[i] = (top, left, h, w, size, size, 0, 0, int(chance[-1] < 0.5))
    return found


def _vertical_first() -> bool:
    """Whether Pillow shrinks a tall image's height before its width (newer versions) or always the width first."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 24, 3), dtype=np.uint8))
    whole = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
    parts = image.resize((24, 16), Image.Resampling.BILINEAR).resize((16, 16), Image.Resampling.BILINEAR)
    return np.array_equal(whole, np.asarray(parts))


VERTICAL_FIRST = _vertical_first()
