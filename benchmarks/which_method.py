"""Which method prunes best, with what it costs and needs: every method at the same MACs on real pretrained networks.

    python benchmarks/which_method.py [--only "resnet20:*:untrained" "resnet20:taylor:finetune"] [--seeds 0 1 2]
        [--epochs 1] [--minutes 60] [--out runs/which_method]
    python benchmarks/which_method.py --table [--out DIR | --results FILE]
    python benchmarks/which_method.py --collect benchmarks/results/which_method.json

Needs DIST_PRUNE_DATA (cifar10.npz, weights/, imagenet_1000_rot180). A piece is network:method:part for one seed:

    dense      the network as it is
    untrained  scoring, surgery, recalibrated batch norms; the same share of every group
    repaired   surgery as in ``untrained``, then least squares on the images that recalibrate there
    global     the same scores with the channels of all groups ranked together
    repaired_global   the network of ``global``, repaired likewise
    finetune   the network of ``untrained``, trained for --epochs passes over the training images not held out
    finetune_global   the network of ``global``, likewise

Pieces are done in the order of the patterns of --only. Each writes one JSON file, and is not done again. Held-out
training images are there to decide by, test images to report. ``--collect`` adds all figures to one compact file;
``--table`` prints Markdown tables of what is there. docs/which-method.md is made of them.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.which_parts import tables
from benchmarks.which_parts.settings import OFFERED, SETTINGS, TARGETS, base_of
from benchmarks.which_parts.study import Study
from dist_prune.fileio import write_atomic

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("dense", "untrained", "repaired", "global", "repaired_global", "finetune", "finetune_global")


def wanted(patterns: list[str], seeds: list[int]) -> Iterator[tuple[str, str, str, int]]:
    """Pieces in the order of the patterns, each once: network, method, part, seed."""
    every = [(network, "dense", "dense", 0) for network in TARGETS if network == base_of(network)]
    for seed in seeds:
        for part in PARTS[1:]:
            every += [
                (network, row, part, seed)
                for network in TARGETS
                for row, setting in SETTINGS.items()
                if seed == seeds[0] or setting.draws or part.startswith("finetune")
                if base_of(network) != "mobilenetv2" or not (part.startswith("finetune") or setting.images > OFFERED)
            ]
    done = set()
    for pattern in patterns:
        network, row, part = pattern.split(":")
        for piece in every:
            if piece not in done and all(map(fnmatchcase, piece[:3], (network, row, part))):
                done.add(piece)
                yield piece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*:*:*"], help="patterns network:method:part, in order of work")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5, help="of the finetune")
    parser.add_argument("--minutes", type=float, default=1e9, help="no piece is begun after so many")
    parser.add_argument(
        "--out", type=Path, help="folder of the pieces; default runs/which_method, with --limit ..._try"
    )
    parser.add_argument("--limit", type=int, help="so many images of each kind, to try the script")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there")
    parser.add_argument("--collect", type=Path, metavar="FILE", help="add all figures to one compact file")
    parser.add_argument("--results", type=Path, metavar="FILE", help="--table: of this compact file")
    given = parser.parse_args()
    given.out = given.out or ROOT / f"runs/which_method{'_try' if given.limit else ''}"
    if any(pattern.count(":") != 2 for pattern in given.only):
        parser.error("--only: patterns have the form network:method:part, each with wildcards: resnet20:*:untrained")
    if given.collect:
        old = tables.load(given.collect) if given.collect.exists() else []
        write_atomic(given.collect, tables.compact(tables.merge(old, tables.read(given.out))))
    if given.table:
        print(tables.markdown(tables.load(given.results) if given.results else tables.read(given.out)))
    if given.table or given.collect:
        return
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    study, end = Study(given.out, given.limit, given.epochs), time.monotonic() + 60 * given.minutes
    for network, row, part, seed in wanted(given.only, given.seeds):
        file = study.file(network, row, part, seed)
        if file.exists() or time.monotonic() > end:
            continue
        try:
            body = study.piece(network, row, part, seed)
        except Exception as error:  # the other pieces are still worth measuring; a failed one is tried again
            print(f"{file.stem}: {type(error).__name__}: {error}", flush=True)
            continue
        write_atomic(file, json.dumps(body, indent=1))
        shown = {
            name: body[name]
            for name in ("held_out", "test", "surgery", "recalibrated", "repaired", "finetuned")
            if name in body
        }
        print(f"{file.stem}: {body['piece']['cpu_seconds']:.0f} s, {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    main()
