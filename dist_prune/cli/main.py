"""``dist-prune VERB``: read the command line, run the verb's file, print its answer."""

import argparse
import contextlib
import json
import os
import sys

from dist_prune import __version__
from dist_prune.cli import (
    check,
    compare,
    doctor,
    export,
    finetune,
    import_checkpoint,
    import_plan,
    latency,
    launch,
    make_ffcv,
    new,
    pack,
    plan,
    prune,
    push,
    ratio_curves,
    report,
    score_many,
    sweep,
    where,
)
from dist_prune.cli import list as list_verb
from dist_prune.cli.verb import Verb
from dist_prune.errors import PruneError, path_trouble

VERBS: dict[str, Verb] = {
    "new": new,
    "prune": prune,
    "finetune": finetune,
    "list": list_verb,
    "check": check,
    "plan": plan,
    "report": report,
    "compare": compare,
    "score-many": score_many,
    "ratio-curves": ratio_curves,
    "sweep": sweep,
    "where": where,
    "launch": launch,
    "export": export,
    "latency": latency,
    "push": push,
    "import-checkpoint": import_checkpoint,
    "import-plan": import_plan,
    "make-ffcv": make_ffcv,
    "pack": pack,
    "doctor": doctor,
}
OWN_OUTPUT = ("finetune", "prune", "ratio-curves")  # they redirect what a run prints themselves
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
        130 if interrupted.
    """
    arguments = _parse(sys.argv[1:] if words is None else words)
    try:
        _check_paths(arguments)
        # ratio-curves prints its answer itself, and does this itself
        redirected = arguments.json and arguments.verb not in OWN_OUTPUT
        with contextlib.redirect_stdout(sys.stderr) if redirected else contextlib.nullcontext():
            text, body, code = VERBS[arguments.verb].run(arguments)
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


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``dist-prune`` with a sub-parser for each verb."""
    parser = argparse.ArgumentParser(
        prog="dist-prune",
        description="Distributed structured pruning of vision networks: everything before and after a run.",
        epilog="Recipes are run by 'accelerate launch dist_prune/run.py --recipe NAME'. "
        "'dist-prune VERB --help' describes a verb.",
    )
    parser.add_argument("--version", action="version", version=f"dist-prune {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        subparser = subparsers.add_parser(name, help=verb.HELP, description=f"{verb.HELP[0].upper()}{verb.HELP[1:]}.")
        verb.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print the result as a JSON document")
    return parser


def _parse(words: list[str]) -> argparse.Namespace:
    """Parse a command line; ``key=value`` and ``--json`` may stand anywhere after the verb."""
    parser = build_parser()
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
