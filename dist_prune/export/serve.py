"""Classify images with an exported network: python serve.py IMAGE ... [FILE.onnx]. Needs onnxruntime, numpy, Pillow."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(image, facts):
    """An image as the network takes it, (1, C, H, W) float32, by the facts in the file's metadata."""
    mean, std, size, crop = (json.loads(facts[key]) for key in ("mean", "std", "size", "crop"))
    image = ImageOps.exif_transpose(image) if json.loads(facts["exif"]) else image
    image = image.convert("RGB" if len(mean) == 3 else "L")
    height, width = [size] * 2 if isinstance(size, int) else size
    scaled = np.floor(np.array([height, width]) / crop)  # the crop keeps its middle
    ratios = np.array([image.height, image.width]) / scaled
    if facts["crop_mode"] != "squash":  # keep the aspect ratio: cover the window, or stay within it
        ratio = ratios.max() if facts["crop_mode"] == "border" else ratios.min()
        exact = np.array([image.height, image.width]) / ratio
        scaled = np.floor(exact + 1e-9) if height == width and facts["crop_mode"] == "center" else np.round(exact)
    high, wide = map(int, scaled)
    image = image.resize((wide, high), Image.Resampling[facts["interpolation"].upper()])
    window = Image.new(image.mode, (width, height), tuple(round(255 * m) for m in mean) if len(mean) == 3 else 0)
    left, top = (-round(over / 2) if over > 0 else -over // 2 for over in (wide - width, high - height))
    window.paste(image, (left, top))
    pixels = np.asarray(window, dtype=np.float32).reshape(height, width, -1) / 255
    return ((pixels - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)[None]


def main(words):
    """Print the five most probable classes of each image; the exit code, or a text if nothing can be done."""
    file = next((w for w in words if w.endswith(".onnx")), str(Path(__file__).with_name("model.onnx")))
    names, failed = [w for w in words if w != file], 0
    if not names or not Path(file).is_file():
        return __doc__ if not names else f"there is no {file}; name the .onnx file"
    session = onnxruntime.InferenceSession(file, providers=onnxruntime.get_available_providers())
    facts = session.get_modelmeta().custom_metadata_map
    for name in names:
        try:
            pixels = prepare(Image.open(name), facts)
        except (OSError, Image.DecompressionBombError) as error:  # missing, no image, or cut short
            print(f"{name} cannot be read: {error}", file=sys.stderr)
            failed = 1
            continue
        logits = np.asarray(session.run(None, {"images": pixels})[0])[0]
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = [f"{facts['classes'].split(chr(10))[i]} {shares[i]:.4f}" for i in shares.argsort()[::-1][:5]]
        print(f"{name}: {', '.join(best)}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
