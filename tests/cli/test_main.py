"""The command line as a whole: each verb has a file of its name, and each of its arguments a help text."""

import argparse
import gc
import subprocess
import sys
from pathlib import Path

import pytest

from dist_prune import cli
from dist_prune.cli.main import VERBS, build_parser, main


def subparsers() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_a_verb_is_a_file_of_its_name():
    files = {file.stem for file in Path(cli.__path__[0]).glob("*.py")}
    assert {verb.replace("-", "_") for verb in VERBS} < files


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_has_a_help_text(verb):
    parser = subparsers()[verb]
    assert parser.description
    assert [action.dest for action in parser._actions if not action.help] == []
    parser.format_help()  # a stray % sign in a help text fails here


@pytest.mark.parametrize("on", [True, False])
def test_a_verb_leaves_garbage_collection_as_it_was(on, capsys):
    """Also where the command line is wrong."""
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        assert main(["list", "methods"]) == 0
        assert gc.isenabled() == on
        with pytest.raises(SystemExit):
            main(["list", "--none"])
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()


def test_help_lines_are_captions():
    for text in VERBS.values():
        assert text[0].islower() and not text.endswith(".")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["list", "recipes"], ["list", "keys"], ["list", "datasets"], ["list", "methods"],
     ["where", "--recipe", "quickstart"], ["sweep", "graph_cifar10"], ["launch", "--help"], ["report", "--help"]],
    ids=" ".join,
)  # fmt: skip
def test_verbs_that_compute_nothing_load_no_torch(words):
    code = "import sys; from dist_prune.cli.main import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "raise SystemExit(9 if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("words", [["--help"], ["list", "methods"], ["list", "recipes"]], ids=" ".join)
def test_lists_that_read_no_recipe_load_no_pydantic(words):
    """It takes longer than all the rest of them."""
    code = "import sys; from dist_prune.cli.main import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "raise SystemExit(', '.join({'pydantic', 'numpy', 'torch', 'timm'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.stderr == "\n" and done.stdout, done.stderr


@pytest.mark.parametrize("verb", ["check", "push", "ratio-curves", "report", "run", "score-many"])
def test_a_name_that_is_not_there_is_refused_before_torch_is_imported(verb):
    more = ["hf://some/where"] if verb == "push" else ["seed=3"] if verb != "report" else []
    code = "import sys; from dist_prune.cli.main import main; code = main(sys.argv[1:])\n"
    code += "raise SystemExit(9 if 'torch' in sys.modules else code)"
    words = [verb, "resnet56_cifar10_grap", *more]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "resnet56_cifar10_grap" in done.stderr
    if verb not in ("push", "report"):
        assert "Did you mean 'resnet56_cifar10_graph'" in done.stderr


@pytest.mark.slow
def test_check_loads_no_compiler_and_leaves_timm_whole():
    """It takes a third of the time of check. What timm and torchvision want of it is there when they want it."""
    code = (
        "import sys; from dist_prune.cli.main import main; main(['check', '--assume', 'resnet50_graph'])\n"
        "names = {'torch._dynamo', 'torch._dynamo.utils', 'sympy'} & {*sys.modules}\n"
        "assert {'timm', 'torchvision.ops'} <= {*sys.modules} and not names, names\n"
        "import torch, timm, torchvision.ops\n"
        "assert torch.compiler.disable.__module__ == 'torch.compiler'\n"
        "from timm.models.naflexvit import NaFlexRopeIterator\n"
        "maps, boxes = torch.rand(1, 2, 8, 8), torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])\n"
        "torch.use_deterministic_algorithms(True)\n"
        "from torchvision.ops.roi_align import is_compile_supported\n"
        "assert torchvision.ops.roi_align(maps, boxes, 2).shape == (1, 2, 2, 2) and is_compile_supported('cpu')\n"
        "assert 'torch._dynamo' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
