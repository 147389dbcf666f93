"""``dist-prune pack``: one split of a data set as tar shards or as an FFCV file."""

import argparse
import re
from pathlib import Path

from dist_prune.cli import make_ffcv
from dist_prune.cli.make_ffcv import print_note, progress_bar
from dist_prune.cli.verb import Answer, check_range
from dist_prune.errors import PruneError
from dist_prune.fileio import folder_trouble


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument(
        "--source",
        required=True,
        help="an image folder, an .npz file, a recipe, parquet:PATTERN or tar:PATTERN, in which {split} or {train,val} "
        "stands for the split",
    )
    parser.add_argument("--split", choices=("train", "eval"), default="train", help="the split (default: train)")
    parser.add_argument("--to", choices=("tar", "ffcv"), default="tar", help="form of the result (default: tar)")
    parser.add_argument("--out", required=True, help="folder of the shards, or the .beton file")
    parser.add_argument("--name", help="tar: start of the shards' names (default: the folder's)")
    parser.add_argument("--shard-mb", type=int, default=512, help="tar: MB of a shard (default: 512)")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="tar: what an unreadable image does (default: fail)",
    )
    make_ffcv.add_encoding(parser)


def run(arguments: argparse.Namespace) -> Answer:
    """Pack the images of one split.

    Raises:
        PruneError: the source has no such images, one of them is damaged, or the result cannot be written.
    """
    if arguments.to == "ffcv":
        return make_ffcv.run(arguments)
    from dist_prune.data.datasets import check_labels, open_source
    from dist_prune.data.tar_writer import describe, write_shards

    check_range("--shard-mb", arguments.shard_mb, 1 << 20)
    if trouble := folder_trouble(Path(arguments.out)):
        raise PruneError(f"--out: {trouble}")
    source, root, split, layout, keys = make_ffcv.origin(arguments)
    train = arguments.split == "train"
    images = open_source(source, root, split, train, print_note, layout, keys)
    check_labels(images, f"the images of {arguments.source}")
    folder = Path(arguments.out).expanduser()
    name = f"{arguments.name or folder.name}-{split or arguments.split}"
    if not re.fullmatch(r"[\w.-]+", name):
        raise PruneError(f"--name: {name!r} is no file name; use letters, digits, dots, dashes")
    facts = write_shards(images, folder, name, arguments.shard_mb << 20, arguments.on_error, print_note, progress_bar)
    return describe(facts, folder, name), facts, 0
