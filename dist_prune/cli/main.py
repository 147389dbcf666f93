"""``dist-prune VERB``: read the command line, run the verb's file, print its answer."""

import argparse
import contextlib
import gc
import json
import os
import sys
from collections.abc import Collection, Iterator
from importlib import import_module
from typing import cast

from dist_prune import __version__
from dist_prune.cli.deferred_imports import import_without_compiler
from dist_prune.cli.verb import Verb
from dist_prune.config.recipe_files import find
from dist_prune.distributed.run_program import run_program
from dist_prune.errors import PruneError, path_trouble

VERBS = {  # verb, whose module has its name -> its line in ``dist-prune --help``
    "run": "run a recipe in one process, or resume it",
    "new": "write a recipe for a folder of images",
    "prune": "prune the network of a file or a folder at once: weights and images in, a bundle out",
    "finetune": "finetune the network of a bundle by a recipe's data and finetune sections",
    "list": "list methods, recipes, backbones, data sets, targets, tasks or recipe keys",
    "check": "check a recipe: what a run would refuse, and its channel groups",
    "plan": "show the plan of a run or of a file, and convert it",
    "status": "list runs: which run, their stages, the last errors",
    "ps": "list what runs now: host, process, ranks, stage, the time that is left, the last sign of life",
    "report": "show the result of a finished run",
    "compare": "compare finished runs in one table and one page with Pareto plots",
    "score-many": "score by several criteria in one pass and compare them at one target",
    "ratio-curves": "measure the task's figure after pruning each channel group alone, nothing finetuned",
    "sweep": "list the numbered tasks of a sweep file",
    "where": "print the run directory of a recipe or of a sweep's task",
    "launch": "write what starts a recipe on nodes: accelerate config, SLURM script, Kubernetes, SkyPilot, torchrun",
    "export": "write a bundle as ONNX or torch.export files, checked on real images",
    "latency": "measure the time of a bundle's network, dense against pruned",
    "push": "push a bundle with its model card to the Hugging Face hub or to a folder",
    "import-checkpoint": "convert a foreign checkpoint to safetensors without running the code in it",
    "import-plan": "make a plan of the files in which a paper's program keeps what it prunes, or such a file of a run",
    "make-ffcv": "write one split of a data set as an FFCV file",
    "pack": "pack a split (image folder, parquet, tar, arrays) into tar shards or an FFCV file",
    "completion": "print a script that completes verbs, options and recipes in a shell",
    "doctor": "check this machine: what is installed, what is missing, how to repair it",
}
NEVER_TRAIN = {"check": True, "compare": False, "export": True, "latency": True, "plan": True}  # -> imports timm
RECIPE_FIRST = ("check", "ratio-curves", "run", "score-many")  # their first argument is a recipe
OWN_OUTPUT = ("finetune", "prune", "ratio-curves", "run")  # they redirect what a run prints themselves
PATH_ARGUMENTS = (
    "bundle",
    "data",
    "destination",
    "file",
    "files",
    "from_json",
    "images",
    "out",
    "output",
    "recipe",
    "run",
    "run_dir",
    "runs",
    "source",
    "sweep",
    "to",
    "to_json",
    "weights",
)


def main(words: list[str] | None = None) -> int:
    """Run one verb.

    Args:
        words: the command line without the program's name; None: that of this process.

    Returns:
        The exit code: 0 if all is well, 1 if doctor found something missing, 2 for an error that its text explains,
        75 if a sweep was stopped and can be resumed, 130 if interrupted.
    """
    words = sys.argv[1:] if words is None else words
    try:
        _check_recipe(words)
        with _without_collections():
            arguments = _parse(words)
        _check_paths(arguments)
        # ratio-curves prints its answer itself, and does this itself
        redirected = arguments.json and arguments.verb not in OWN_OUTPUT
        with contextlib.redirect_stdout(sys.stderr) if redirected else contextlib.nullcontext():
            text, body, code = _module(arguments.verb).run(arguments)
    except PruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the verb's messages has gone
        return _discard_output(1)
    try:
        if body is not None:  # None: ratio-curves has printed it, on the first of its processes
            print(json.dumps(body, indent=1) if arguments.json else text)
        sys.stdout.flush()
    except BrokenPipeError:  # dist-prune list backbones | head
        return _discard_output(code)
    return code


def build_parser(verbs: Collection[str] = tuple(VERBS)) -> argparse.ArgumentParser:
    """The parser of ``dist-prune`` with a sub-parser for each verb.

    Args:
        verbs: those whose arguments are declared, for which their modules are imported: some need torch.
    """
    parser = argparse.ArgumentParser(
        prog="dist-prune",
        description="Distributed structured pruning of vision networks: everything before and after a run.",
        epilog=f"Recipes are run by 'accelerate launch {run_program()} --recipe NAME'. "
        "'dist-prune VERB --help' describes a verb.",
    )
    parser.add_argument("--version", action="version", version=f"dist-prune {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in VERBS.items():
        subparser = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name in verbs:
            _module(name).add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print the result as a JSON document")
    return parser


def _module(verb: str) -> Verb:
    if verb in NEVER_TRAIN:
        import_without_compiler(timm=NEVER_TRAIN[verb])
    return cast(Verb, import_module(f"dist_prune.cli.{verb.replace('-', '_')}"))


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Import verbs without garbage collections, which take a fifth of torch's and timm's import and find nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()  # modules stay to the end: later collections need not look at them
            gc.enable()


def _parse(words: list[str]) -> argparse.Namespace:
    """Parse a command line; ``key=value`` and ``--json`` may stand anywhere after the verb."""
    parser = build_parser({word for word in words if word in VERBS})
    words = sorted(words, key=lambda word: word == "--json")
    arguments, more = parser.parse_known_args(words)
    keys = next(
        (getattr(arguments, name) for name in ("words", "overrides", "files") if hasattr(arguments, name)), None
    )
    if more:  # key=value (or a further file) after an option
        if keys is None or any(word.startswith("-") for word in more):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        keys += more
    return arguments


def _check_recipe(words: list[str]) -> None:
    """Raise a ``PruneError`` for a recipe that is not there, before the seconds in which its verb imports torch."""
    verb, recipe = [*words, "", ""][:2]
    asked = verb in RECIPE_FIRST and not recipe.startswith("-") and "=" not in recipe
    if recipe and asked and not {"-h", "--help"}.intersection(words):
        find(recipe)


def _check_paths(arguments: argparse.Namespace) -> None:
    """Raise a ``PruneError`` for an argument that cannot be a path: the system would raise instead of answering."""
    for name in PATH_ARGUMENTS:
        value = getattr(arguments, name, None)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (trouble := path_trouble(text)):
                raise PruneError(f"{name.replace('_', '-')}: {trouble}")


def _discard_output(code: int) -> int:
    """Discard what is left in stdout's buffer, also at exit: nothing reads it any more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
