"""The house: who may import whom, no circle, short files, no standard-library names. Read from the code itself."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_prune import methods

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dist_prune"
FILES = sorted(PACKAGE.rglob("*.py"))
GIANTS = {
    "torch.distributed": {"runtime/collectives.py"},
    "torch_pruning": {"pruning/tracer.py", "pruning/surgeon.py"},
    "timm": {
        "runtime/backbones/__init__.py",
        "runtime/backbones/arguments.py",
        "runtime/backbones/registry.py",
        "runtime/training/optim.py",
        "runtime/training/objective.py",
        "runtime/training/train.py",
        "runtime/training/fast.py",
        "runtime/data/transforms.py",  # its evaluation transform and auto-augment policies
    },
    "ffcv": {"runtime/data/stream.py"},
    "accelerate": {"runtime/machine.py", "runtime/tracking.py"},
    "deepspeed": {"runtime/machine.py", "runtime/training/zero.py"},
    "onnx": {"runtime/formats.py"},
    "onnxruntime": {"runtime/formats.py"},
    "huggingface_hub": {"hub.py"},
    "jinja2": {"report/html.py"},
    "matplotlib": {"report/figures.py", "report/html.py", "report/compare_html.py", "report/ratio_curves_html.py"},
}
# room -> rooms it may import from (beside itself); a room is a folder or a file of the package
ALLOWED = {
    "errors": set(),
    "documents": {"errors"},
    "fileio": {"errors"},
    "config": {"errors", "documents", "fileio", "compatibility"},
    "folders": {"errors"},
    "compatibility": set(),
    "ledger": {"compatibility", "errors", "documents", "fileio"},
    "pruning": {"errors", "config"},  # costs are keys of a recipe's target section
    "runtime": {"errors", "config", "fileio"},
    "methods": {"errors", "pruning"},
    "observing": {"errors", "pruning", "runtime"},
    "bench": {"errors", "config", "pruning", "runtime", "observing"},
    "onepass": {"pruning", "bench"},
    "hub": {"errors", "documents", "pruning", "runtime"},
    "manifest": {"errors"},
    "bundle": {"errors", "documents", "manifest", "pruning", "runtime", "hub"},
    "exporting": {"errors", "config", "methods", "runtime", "bundle", "hub"},
    "preview": {"errors", "config", "pruning", "runtime", "methods"},
    "doctor": {"errors"},
    "lastword": set(),
    "replay": {"errors", "documents", "pruning"},
    "foreseen": {"errors", "ledger", "methods", "pruning", "config", "replay", "runtime"},
    "planning": {"errors", "config", "pruning", "methods", "preview", "replay", "fileio"},
    "report": {"pruning", "config", "runtime"},
    "stages": {
        "config",
        "compatibility",
        "errors",
        "documents",
        "ledger",
        "pruning",
        "runtime",
        "methods",
        "bench",
        "bundle",
        "onepass",
        "replay",
        "foreseen",
        "report",
        "fileio",
    },
    "run": {
        "errors",
        "folders",
        "lastword",
        "config",
        "ledger",
        "runtime",
        "methods",
        "stages",
        "fileio",
    },
    "comparing": {
        "compatibility",
        "errors",
        "documents",
        "config",
        "ledger",
        "pruning",
        "runtime",
        "report",
        "fileio",
    },
    "launching": {"errors", "config", "methods"},
    "scoring": {"pruning", "compatibility", "errors", "folders", "config", "ledger", "methods", "runtime", "run"},
    "ratios": {
        "errors",
        "config",
        "methods",
        "runtime",
        "stages",
        "report",
        "run",
        "fileio",
    },
    "cli": {
        "errors",
        "documents",
        "ratios",
        "scoring",
        "config",
        "runtime",
        "methods",
        "preview",
        "doctor",
        "report",
        "planning",
        "launching",
        "comparing",
        "exporting",
        "foreseen",
    },
}


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def imports_of(file: Path) -> set[str]:
    """Every module that a file imports anywhere in it, ``from a import b`` as both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "dist_prune" and len(parts) > 1 and parts[1] in ALLOWED else None


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_arrows_only_point_down(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        assert not {room_of(module) for module in imports_of(file)} - {None}
        return
    used = {room_of(module) for module in imports_of(file)} - {None, own}
    assert used <= ALLOWED[own], f"{name_of(file)} may not import {used - ALLOWED[own]}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_each_giant_has_one_door(file):
    for giant, doors in GIANTS.items():
        used = {m for m in imports_of(file) if m == giant or m.startswith(giant + ".")}
        assert not used or name_of(file) in doors, f"{name_of(file)} imports {used}"


def modules_of(folder: Path, shared: set[str]) -> dict[str, list[Path]]:
    """Name of a paper or stage -> its files: one, or all of a folder; without what all of them share."""
    own = {file.stem: [file] for file in folder.glob("*.py") if file.stem not in {"__init__", *shared}}
    return own | {init.parent.name: sorted(init.parent.rglob("*.py")) for init in folder.glob("*/__init__.py")}


def strangers(package: str, modules: dict[str, list[Path]]) -> list[str]:
    """Files that import another module of their folder's."""
    out = []
    for name, files in modules.items():
        others = {f"{package}.{other}" for other in modules if other != name}
        for file in files:
            used = {".".join(module.split(".")[:3]) for module in imports_of(file)}
            out += [f"{name}: {file.name}"] if used & others else []
    return out


def test_papers_and_stages_do_not_know_one_another():
    stages = {
        "context",
        "images",
        "networks",
        "code",
        "fitting",
        "sharing",
        "timing",
        "calibrating",
        "checking",
        "criteria",
        "order",
    }
    for folder, shared in (("methods", set(methods.SHARED)), ("stages", stages)):
        assert strangers(f"dist_prune.{folder}", modules_of(PACKAGE / folder, shared)) == []


def test_papers_use_no_files_and_no_network():
    banned = {"os", "pathlib", "io", "socket", "urllib", "requests", "subprocess", "shutil"}
    for files in modules_of(PACKAGE / "methods", set()).values():
        for file in files:
            assert not {module.split(".")[0] for module in imports_of(file)} & banned, name_of(file)


def test_a_paper_s_folder_is_looked_through(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "shared.py").touch()
    (tmp_path / "alone.py").write_text(
        "from dist_prune.methods import shared\nfrom dist_prune.methods.folder import x\n"
    )
    (tmp_path / "folder/__init__.py").write_text("from dist_prune.methods.folder.method import Method\n")
    (tmp_path / "folder/method.py").write_text("from dist_prune.methods.alone import y\nimport os\n")
    papers = modules_of(tmp_path, {"shared"})
    assert {name: [file.name for file in files] for name, files in papers.items()} == {
        "alone": ["alone.py"], "folder": ["__init__.py", "method.py"],
    }  # fmt: skip
    assert strangers("dist_prune.methods", papers) == ["alone: alone.py", "folder: method.py"]


def test_the_configuration_needs_no_library_but_pydantic_and_yaml():
    for file in (PACKAGE / "config").glob("*.py"):
        used = {module.split(".")[0] for module in imports_of(file)}
        assert used <= sys.stdlib_module_names | {"dist_prune", "pydantic", "yaml"}, name_of(file)


def test_no_import_circle():
    modules = {}
    for file in FILES:
        dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[dotted] = file
    arrows = {name: {m for m in imports_of(file) if m in modules and m != name} for name, file in modules.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in arrows[name]:
                # 'from package import module' names the package too; that is no arrow back to its __init__
                if not name.startswith(other + "."):
                    visit(other, (*path, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= 350


def test_no_file_shadows_the_standard_library():
    """Launched by path, dist_prune/ comes first in sys.path."""
    names = {file.stem for file in PACKAGE.glob("*.py")} | {f.name for f in PACKAGE.iterdir() if f.is_dir()}
    assert not names & sys.stdlib_module_names


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_html_stands_in_templates(file):
    """Pages are templates of report/templates, which escape what they are given; no Python text holds an element."""
    elements = (
        "html|head|body|style|script|h[1-6]|p|div|span|table|thead|tbody|tr|th|td|ul|li|pre|code|svg|figure|img|br"
    )
    texts = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
    assert not [text for text in texts if isinstance(text, str) and re.search(rf"</?(?:{elements})\b", text)]


def test_no_benchmark_shadows_a_package():
    """A script's own folder comes first in sys.path: benchmarks/coverage.py was what numba got for coverage."""
    taken = set(importlib.metadata.packages_distributions()) | sys.stdlib_module_names
    assert not {file.stem for file in (ROOT / "benchmarks").glob("*.py")} & taken


@pytest.mark.parametrize(
    "module", ["dist_prune", "dist_prune.config.sweep", "dist_prune.ledger", "dist_prune.fileio", "dist_prune.doctor"]
)
def test_these_import_no_torch_and_no_templates(module):
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'jinja2', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
