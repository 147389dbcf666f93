"""``dist-prune make-ffcv``: one split of a data set as an FFCV file with a sidecar."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from dist_prune import methods
from dist_prune.cli.verb import Answer, check_range
from dist_prune.config import loading
from dist_prune.errors import PruneError
from dist_prune.fileio import folder_trouble

if TYPE_CHECKING:
    from dist_prune.data.datasets import DatasetKeys
    from dist_prune.data.random_access import Root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument(
        "--source", required=True, help="an image folder, an .npz file, a recipe, parquet:PATTERN or tar:PATTERN"
    )
    parser.add_argument(
        "--split", choices=("train", "eval"), default="train", help="the split of a source with both (default: train)"
    )
    parser.add_argument(
        "--out", help="the .beton file to write (default: beside the data, where data.backend=auto finds it)"
    )
    add_encoding(parser)


def add_encoding(parser: argparse.ArgumentParser) -> None:
    """Declare how images are stored."""
    parser.add_argument(
        "--max-resolution", type=int, default=256, help="longest side in pixels; larger images shrink (default: 256)"
    )
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality, 1 to 100 (default: 90)")
    parser.add_argument(
        "--write-mode", choices=("jpg", "raw", "proportion"), default="jpg", help="how pixels are stored (default: jpg)"
    )
    parser.add_argument("--workers", type=int, default=0, help="number of encoding processes (default: one per core)")


def run(arguments: argparse.Namespace) -> Answer:
    """Encode the images of one split.

    Raises:
        PruneError: if FFCV is missing, the source has no such images, or the output is not named ``.beton``.
    """
    from dist_prune.data.datasets import OPENERS, check_labels, open_source
    from dist_prune.data.ffcv.backend import import_loader
    from dist_prune.data.open_split import beton_path
    from dist_prune.data.random_access import target_kind
    from dist_prune.distributed.cpu_count import cores

    import_loader()
    from dist_prune.data.ffcv.encoder import Settings
    from dist_prune.data.ffcv.writer import write_beton

    source, root, split, layout, keys = origin(arguments)
    if source not in OPENERS:
        raise PruneError(
            f"--source: {source} is a Dataset, whose images are read by its own code and not from a .beton"
        )
    train = arguments.split == "train"
    out = Path(arguments.out) if arguments.out else beton_path(source, root, split, train)
    if out is None or out.suffix != ".beton":
        raise PruneError(f"--out: {out or source} must be a path that ends in .beton")
    if trouble := folder_trouble(out.parent):
        raise PruneError(f"--out: {trouble}")
    if arguments.workers:
        check_range("--workers", arguments.workers, 1024)
    settings = Settings(arguments.max_resolution, arguments.quality, arguments.write_mode)
    images = open_source(source, root, split, train, print_note, layout, keys)
    if target_kind(images) != "classes":
        raise PruneError(
            f"--source: a .beton holds one class number for each image; {source} has {target_kind(images)}"
        )
    check_labels(images, f"the images of {arguments.source}")
    stored = {"kind": source, "root": root, "split": split}
    facts = write_beton(images, stored, out, settings, arguments.workers or cores(), print_note, progress_bar)
    text = f"{out}: {facts['count']:,} images of {len(facts['classes'])} classes, {facts['bytes'] / 2**20:,.1f} MiB"
    return text, facts | {"file": str(out)}, 0


def print_note(text: str) -> None:
    """Print a line beside the progress bar."""
    print(text, file=sys.stderr)


def progress_bar(done: int, count: int) -> tqdm:
    """A bar over all images, some of which are done."""
    return tqdm(total=count, initial=done, desc="images", unit="", smoothing=0.1)


def origin(arguments: argparse.Namespace) -> "tuple[str, Root, str, str | None, DatasetKeys | None]":
    """data.source, data.root, the name of the split that ``--source`` means, data.layout, and a recipe's other keys.

    Raises:
        PruneError: there is no such folder, file or recipe.
    """
    from dist_prune.data.datasets import DatasetKeys
    from dist_prune.data.listed_layouts import find_listing

    kind, _, pattern = arguments.source.partition(":")
    train = arguments.split == "train"
    if kind in ("parquet", "tar") and pattern:
        return kind, pattern, "train" if train else "val", None, DatasetKeys(splits=("train", "val"))
    path = Path(arguments.source).expanduser()
    if path.is_dir():
        split = "train" if train else "val"
        if (path / split).is_dir() or find_listing(path, split, train):
            return "imagefolder", str(path), split, None, None
        return "imagefolder", str(path.parent), path.name, None, None
    if path.suffix == ".npz":
        return "npz", str(path), arguments.split, None, None
    if not path.is_file() and (os.sep in arguments.source or "*" in arguments.source):
        raise PruneError(
            f"--source: there is no {path}; name an image folder, an .npz file, a recipe, or shards as "
            "tar:PATTERN or parquet:PATTERN"
        )
    data = loading.load(arguments.source, [], methods.options_of).data
    split = data.train_split if train else data.eval_split
    return data.source, data.root, split, data.layout, DatasetKeys.of(data)
