"""The command line as a whole: each verb has a file of its name, and each of its arguments a help text."""

import argparse
from pathlib import Path

import pytest

from dist_prune import cli
from dist_prune.cli.main import VERBS, build_parser


def subparsers() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_a_verb_is_a_file_of_its_name():
    assert {f"dist_prune.cli.{verb.replace('-', '_')}" for verb in VERBS} == {
        getattr(module, "__name__", "") for module in VERBS.values()
    }
    files = {file.stem for file in Path(cli.__path__[0]).glob("*.py")}
    assert {verb.replace("-", "_") for verb in VERBS} < files


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_has_a_help_text(verb):
    parser = subparsers()[verb]
    assert parser.description
    assert [action.dest for action in parser._actions if not action.help] == []
    parser.format_help()  # a stray % sign in a help text fails here


def test_help_lines_are_captions():
    for verb in VERBS.values():
        assert verb.HELP[0].islower() and not verb.HELP.endswith(".")
