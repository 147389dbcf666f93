"""Pillow's resize, bit for bit, compiled: FFCV's pipeline applies it to decoded images.

FFCV resizes by OpenCV's area average, which no other loader has, so a network would get other pixels than from another
backend. This is the two-pass fixed-point resampling of Pillow (src/libImaging/Resample.c: coefficients with 22
fractional bits, 8 bits between the passes), for a window of the result. The order of the passes changes the rounding.
Pillow 13 does the vertical pass first if the height shrinks by more than twice what the width shrinks by; older
versions never do. ``VERTICAL_FIRST`` is measured on the installed version.
"""

import math

import numpy as np
from numba import njit
from PIL import Image

KINDS = {"nearest": 0, "bilinear": 1, "bicubic": 2}
BITS = 22
HALF = 1 << (BITS - 1)
# Without fastmath=False a function inherits the fastmath of its caller (FFCV): other roundings, cached on disk.
exact_njit = njit(nogil=True, cache=True, fastmath=False)


@exact_njit
def _weight(kind: int, x: float) -> float:
    x = abs(x)
    if kind == 1:
        return 1.0 - x if x < 1.0 else 0.0
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@exact_njit
def _filter_taps(length: int, resized: int, start: int, count: int, kind: int):
    """Source samples and weights of a part of a resized line.

    Args:
        length: samples of the source line.
        resized: samples of the resized line.
        start: first sample wanted of the resized line.
        count: number of samples wanted.
        kind: of interpolation, a value of ``KINDS``.

    Returns:
        First source sample (count,), number of source samples (count,), and weights (count, most) in units of 2**-22.
    """
    scale = length / resized
    first, counts = np.empty(count, np.int32), np.empty(count, np.int32)
    if kind == 0:
        weights = np.full((count, 1), 1 << BITS, np.int32)
        position = scale * 0.5  # summed step by step as in Pillow, so ties round the same way
        for i in range(start + count):
            if i >= start:
                first[i - start], counts[i - start] = min(int(position), length - 1), 1
            position += scale
        return first, counts, weights
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
        first[i], counts[i] = low, high - low
    return first, counts, weights


@exact_njit
def _byte(value: int) -> int:
    return min(max(value >> BITS, 0), 255)


@exact_njit
def _horizontal_pass(source, top, left, taps, mirror, out):
    """Resample rows ``top`` onwards of ``source`` (H, W, 3), as many as ``out`` (n, size, 3) has."""
    first, counts, weights = taps
    size = out.shape[1]
    for y in range(out.shape[0]):
        line = source[top + y]
        for x in range(size):
            red = green = blue = HALF
            for k in range(counts[x]):
                weight, column = weights[x, k], left + first[x] + k
                red += weight * line[column, 0]
                green += weight * line[column, 1]
                blue += weight * line[column, 2]
            pixel = out[y, size - 1 - x if mirror else x]
            pixel[0], pixel[1], pixel[2] = _byte(red), _byte(green), _byte(blue)


@exact_njit
def _vertical_pass(source, top, left, taps, out):
    """Resample columns ``left`` onwards of ``source`` (H, W, 3), as many as ``out`` (size, n, 3) has."""
    first, counts, weights = taps
    width = 3 * out.shape[1]
    total = np.empty(width, np.int32)
    for y in range(out.shape[0]):
        total[:] = HALF
        for k in range(counts[y]):
            weight = weights[y, k]
            line = source[top + first[y] + k].reshape(-1)[3 * left : 3 * left + width]
            for x in range(width):
                total[x] += weight * line[x]
        target = out[y].reshape(-1)
        for x in range(width):
            target[x] = _byte(total[x])


@exact_njit
def _source_range(taps):
    """First source sample that is needed, and the one after the last."""
    first, counts, _ = taps
    return first.min(), (first + counts).max()


@exact_njit
def resample_window(image, box, resized, window, kind, vertical_first, mirror, out):
    """Crop a box of an image, resize it, and write a window of the result.

    Args:
        image: (H, W, 3) uint8.
        box: (top, left, height, width) in pixels; pixels outside it are not read.
        resized: (rows, columns) to which the box is resized.
        window: (top, left) of the wanted part of the resized box.
        kind: of interpolation, a value of ``KINDS``.
        vertical_first: whether the installed Pillow ever does the vertical pass first (``VERTICAL_FIRST``).
        mirror: whether to mirror the window left to right.
        out: (size, size, 3) uint8, C-contiguous, overwritten; its size is that of the window.
    """
    top, left, height, width = box
    rows, columns = resized
    size = out.shape[0]
    vertical = _filter_taps(height, rows, window[0], size, kind)
    horizontal = _filter_taps(width, columns, window[1], size, kind)
    if vertical_first and height > rows and 2 * (width - columns) < height - rows:
        begin, end = _source_range(horizontal)
        middle = np.empty((size, end - begin, 3), np.uint8)
        _vertical_pass(image, top, left + begin, vertical, middle)
        _horizontal_pass(middle, 0, -begin, horizontal, mirror, out)
    else:
        begin, end = _source_range(vertical)
        middle = np.empty((end - begin, size, 3), np.uint8)
        _horizontal_pass(image, top + begin, left, horizontal, mirror, middle)
        _vertical_pass(middle, -begin, 0, vertical, out)


@exact_njit
def resample_row(image, row, kind, vertical_first, out):
    """Apply ``resample_window`` with a row of ``centre_windows`` or ``random_windows``.

    Args:
        image: (H, W, 3) uint8.
        row: (9,) int32.
        kind: of interpolation, a value of ``KINDS``.
        vertical_first: ``VERTICAL_FIRST``.
        out: (size, size, 3) uint8, overwritten.
    """
    box, resized, window = (row[0], row[1], row[2], row[3]), (row[4], row[5]), (row[6], row[7])
    resample_window(image, box, resized, window, kind, vertical_first, row[8] != 0, out)


@exact_njit
def empty_image(height, width):
    """(height, width, 3) uint8, uninitialised."""
    return np.empty((height, width, 3), np.uint8)


@exact_njit
def copy_raw(data, image):
    """Copy raw pixels (n,) into an image; returns 0, or 1 if their number is wrong."""
    flat = image.reshape(-1)
    if len(flat) != len(data):
        return 1
    for i in range(len(flat)):
        flat[i] = data[i]
    return 0


@exact_njit
def centre_windows(sides, size, short):
    """Windows of the evaluation transform: resize the shorter side, crop the centre.

    Roundings are those of torchvision's Resize and CenterCrop.

    Args:
        sides: (n, 2) height and width in pixels.
        size: side of the square that is cropped.
        short: pixels to which the shorter side is resized.

    Returns:
        (n, 9) int32: box (top, left, height, width), its resized (rows, columns), window (top, left), and 1 to mirror.
    """
    windows = np.zeros((len(sides), 9), np.int32)
    for i in range(len(sides)):
        height, width = sides[i]
        rows = short if height <= width else int(short * height / width)
        columns = short if width <= height else int(short * width / height)
        windows[i, 2:] = (height, width, rows, columns, round((rows - size) / 2.0), round((columns - size) / 2.0), 0)
    return windows


@exact_njit
def random_windows(sides, uniforms, scale, ratio, size):
    """Windows of training images, resized to a square: the windows of ``augment.crop_window``.

    Args:
        sides: (n, 2) height and width in pixels.
        uniforms: (n, 2 * tries + 3) float64, see ``augment.window_uniforms``.
        scale: (lowest, highest) fraction of the area.
        ratio: (lowest, highest) aspect ratio.
        size: side of the square.

    Returns:
        (n, 9) int32, see ``centre_windows``.
    """
    windows = np.zeros((len(sides), 9), np.int32)
    low, high, tries = math.log(ratio[0]), math.log(ratio[1]), (uniforms.shape[1] - 3) // 2
    for i in range(len(sides)):
        (height, width), row = sides[i], uniforms[i]
        top, left, h, w = 0, 0, 0, 0
        for attempt in range(tries):
            area = height * width * (scale[0] + row[attempt] * (scale[1] - scale[0]))
            aspect = math.exp(low + row[tries + attempt] * (high - low))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(row[2 * tries] * (height - h + 1)), int(row[2 * tries + 1] * (width - w + 1))
                break
        else:
            aspect = min(max(width / height, ratio[0]), ratio[1])
            w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
            top, left = (height - h) // 2, (width - w) // 2
        windows[i] = (top, left, h, w, size, size, 0, 0, int(row[-1] < 0.5))
    return windows


def _vertical_first() -> bool:
    """Whether Pillow shrinks a tall image's height before its width (newer versions) or always the width first."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 24, 3), dtype=np.uint8))
    at_once = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
    in_two_steps = image.resize((24, 16), Image.Resampling.BILINEAR).resize((16, 16), Image.Resampling.BILINEAR)
    return np.array_equal(at_once, np.asarray(in_two_steps))


VERTICAL_FIRST = _vertical_first()
