"""``dist-prune new``: a recipe for a folder of images, with the figures found there and the reason of each choice."""

import argparse
import json
from pathlib import Path

from dist_prune import methods
from dist_prune.cli.composed_run import parse_target
from dist_prune.cli.found_images import FoundImages, look
from dist_prune.cli.verb import Answer
from dist_prune.config import loading
from dist_prune.config.familiar_names import canonical_method
from dist_prune.config.recommendation import AUTO
from dist_prune.distributed.run_program import run_program
from dist_prune.errors import PruneError, abbreviate
from dist_prune.fileio import write_atomic

UPDATES = 4000  # of a training that starts from pretrained weights, at which the epochs aim


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument(
        "--data",
        required=True,
        help="folder of images (class folders, lists, tar or parquet files) or .npz",
    )
    parser.add_argument("--backbone", required=True, help="timm's name of the network")
    parser.add_argument("--target", default="macs=0.5", metavar="COST=SHARE", help="what is kept (default: macs=0.5)")
    parser.add_argument("--method", default=AUTO, help="name of the method (default: auto, the recommended one)")
    parser.add_argument("-o", "--out", help="the file to write (default: <folder's name>.yaml)")


def run(arguments: argparse.Namespace) -> Answer:
    """Look at the images, write the recipe, and load it as a run would.

    Raises:
        PruneError: the images, the network or the target are refused, or the file exists.
    """
    from dist_prune import models  # timm takes seconds to import

    models.check(arguments.backbone, {})
    target = parse_target(arguments.target)
    if arguments.method != AUTO:
        methods.find(arguments.method)
    folder = Path(arguments.data).expanduser()
    found = look(folder)
    out = Path(arguments.out or f"{folder.resolve().stem}.yaml")
    if out.exists():
        raise PruneError(f"--out: {out} exists; name another file")
    channels = 3
    model = models.create(arguments.backbone, len(found.classes), channels)
    native = models.image_config(model, channels)["input_size"][1]
    pretrained = models.pretrained_classes(arguments.backbone) is not None
    method = canonical_method(arguments.method)
    text = recipe_text(arguments.backbone, found, target, method, native, pretrained, out)
    write_atomic(out, text)
    try:
        loading.load(str(out), [], methods.options_of)
    except PruneError:
        out.unlink()
        raise
    end = f"{out}: a recipe for {sum(found.counts.values()):,} images of {len(found.classes)} classes"
    body = {
        "file": str(out), "classes": list(found.classes), "images": found.counts, "sides": list(found.sides),
        "unreadable": found.unreadable,
    }  # fmt: skip
    command = f"accelerate launch {run_program()} --recipe {out}"
    return f"{end}\nlook    dist-prune check {out}\nrun     {command}", body, 0


def choose_size(found: FoundImages, native: int) -> tuple[int, str]:
    """The side of the network's input and why: its own, or less if the images are smaller, in steps of 32.

    Args:
        found: the images.
        native: the side that the network was made for, in pixels.
    """
    median = found.sides[1]
    if found.data["source"] == "npz":
        return median, "the arrays' own side"
    if median >= native:
        return native, f"the network's own side; the median image has {median} pixels"
    side = max(32, -(-median // 32) * 32)
    if side >= native:
        return native, f"the network's own side; the median image has {median} pixels"
    return side, f"the median image has {median} pixels, and enlarging to {native} would cost time and show no more"


def choose_batch(learned: int, classes: int) -> int:
    """A global batch size: 64, or less for few images, so that an epoch has ten updates or more."""
    batch = 64
    while batch > 8 and (learned // batch < 10 or batch > learned // 2):
        batch //= 2
    return min(batch, max(2, learned // 2), max(8, 16 * classes))


def choose_epochs(learned: int, batch: int, pretrained: bool) -> int:
    """Epochs that make about 4,000 updates, between 5 and 60; twice as many (at most 200) from random weights."""
    epochs = round(UPDATES / max(1, learned // batch))
    return max(5, min(60, epochs)) if pretrained else max(10, min(200, 2 * epochs))


def recipe_text(
    backbone: str, found: FoundImages, target: dict[str, float], method: str, native: int, pretrained: bool, out: Path
) -> str:
    """The recipe as YAML with comments.

    Args:
        backbone: name of the network.
        found: the images.
        target: cost -> share that is kept.
        method: name of the method, or auto.
        native: the side that the network was made for, in pixels.
        pretrained: whether timm has weights for it.
        out: the file, for the commands in the head.
    """
    side, why_side = choose_size(found, native)
    train = found.counts["train"]
    holdout = 0.2 if train < 1000 else 0.1
    learned = int(train * (1 - holdout))
    batch = choose_batch(learned, len(found.classes))
    epochs = choose_epochs(learned, batch, pretrained)
    lr = 0.01 * batch / 64 if pretrained else 0.1 * batch / 128
    score = min(1000, train)
    cost, share = next(iter(target.items()))
    small, median, large = found.sides
    data = {**found.data, "image_size": side}
    augment = "crop_flip" if side <= 64 else "resized_crop_flip"
    data |= {"augment": augment} | ({"crop_scale": [0.35, 1.0]} if augment == "resized_crop_flip" else {})
    if found.unreadable:
        data["on_error"] = "skip"
    training = (
        f"{{epochs: {epochs}, batch: {batch}, lr: {lr:g}, weight_decay: 1.0e-4, warmup_epochs: 1, holdout: {holdout}}}"
    )
    counts = ", ".join(f"{count:,} in {split}" for split, count in found.counts.items())
    lines = [
        f"# {backbone} on your images, with {share:g} of its {cost} kept.",
        f"# found     {len(found.classes)} classes ({abbreviate(found.classes, 5)}); {counts}; the smallest class has "
        f"{found.smallest} training images",
        f"#           shorter sides: {small} to {large} pixels, median {median} ({found.read:,} images were read"
        f"{', spread over all' if found.read < sum(found.counts.values()) else ''})",
    ]
    if found.unreadable:
        first = found.unreadable[0]
        lines.append(f"#           {len(found.unreadable)} of them cannot be read and are left out: {first}")
    lines += [
        f"# look      dist-prune check {out}",
        f"# run       accelerate launch {run_program()} --recipe {out}",
        f"# result    runs/{_name(out)}/export, the bundle; runs/{_name(out)}/report.html, the figures",
        f"name: {_name(out)}",
        "seed: 0",
        "# timm fetches the weights once; with a file of your own: backbone.checkpoint=FILE backbone.pretrained=false"
        if pretrained
        else "# timm has no weights of this network: it is trained from random ones. A file: backbone.checkpoint=FILE",
        f"backbone: {{name: {json.dumps(backbone)}, pretrained: {json.dumps(pretrained)}}}",
    ]
    if found.one_split:
        lines += [
            "# WARNING: there is one split, so the images that are trained on also give the final figures, which are",
            "# too good. The held-out share below chooses the epochs. For honest figures move some images of each",
            "# class to another folder, and name it in eval_split.",
        ]
    lines += [
        f"# image_size: {why_side}",
        f"data: {json.dumps(data)}",
        f"# batch {batch}: {learned // batch} updates an epoch; epochs {epochs}: about {epochs * (learned // batch):,} "
        f"updates; lr {lr:g}: {'small, the weights are trained' if pretrained else 'for random weights'}, in "
        "proportion to the batch",
        f"# holdout {holdout}: {train - learned} training images choose the epoch that is kept, no test image does",
        f"train: {training}",
        f"score: {{images: {score}, micro_batch: {min(50, score)}}}  # "
        + ("all training images" if score == train else "enough for a stable ranking"),
        f"method: {{name: {method}}}"
        + ("  # the recommended one; 'dist-prune list methods' has the others" if method == AUTO else ""),
        "select: {scope: global, max_ratio: 0.9}  # no group loses more than nine tenths",
        f"target: {{{cost}: {share:g}}}",
        f"finetune: {training}",
        "report: {latency_batches: [1, 32]}",
    ]
    return "\n".join(lines) + "\n"


def _name(out: Path) -> str:
    """A run's name from a file's: letters, digits, dots and dashes."""
    return "".join(sign if (sign.isalnum() and sign.isascii()) or sign in "._-" else "_" for sign in out.stem) or "new"
