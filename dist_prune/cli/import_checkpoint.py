"""``dist-prune import-checkpoint``: the weights of a foreign checkpoint as a safetensors file."""

import argparse
from pathlib import Path

from dist_prune.cli.verb import Answer
from dist_prune.errors import PruneError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("file", help="a .pth, .pt, .th, .tar or .safetensors file")
    parser.add_argument(
        "--key", default="auto", help="the weights to take from a file with several: auto, ema, or an entry's name"
    )
    parser.add_argument("--skip", nargs="+", default=[], metavar="GLOB", help="names in the file to leave out")
    parser.add_argument("--out", required=True, help="the .safetensors file to write")


def run(arguments: argparse.Namespace) -> Answer:
    """Read the checkpoint without unpickling objects and write its tensors.

    Raises:
        PruneError: if the output is not named ``.safetensors``, or the checkpoint cannot be read.
    """
    from dist_prune.distributed import tensor_files

    out = Path(arguments.out)
    if out.suffix != ".safetensors":
        raise PruneError(f"--out: {out} must end in .safetensors")
    messages: list[str] = []
    weights = tensor_files.read_weights(Path(arguments.file), arguments.key, arguments.skip, say=messages.append)
    tensor_files.save_tensors(out, weights)
    count = sum(tensor.numel() for tensor in weights.values())
    body = {"file": str(out), "tensors": len(weights), "parameters": count, "said": messages}
    return "\n".join([*messages, f"{out}: {len(weights)} tensors, {count:,} values"]), body, 0
