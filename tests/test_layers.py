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
    "torch.distributed": {"distributed/communicator.py"},
    "torch_pruning": {"pruning/graph/tracer.py", "pruning/surgery/surgeon.py"},
    "timm": {
        "models/__init__.py",
        "models/model_kwargs.py",
        "models/plugin_networks.py",
        "models/registry.py",
        "models/unet.py",
        "training/optim.py",
        "training/loss.py",
        "training/trainer.py",
        "training/acceleration.py",
        "models/timm_networks.py",  # networks by name, from folders and hubs
        "models/torchvision_networks.py",  # its rule for the weights of a first convolution of other channels
        "data/timm_transforms.py",  # its evaluation transform and auto-augment policies
    },
    "ffcv": {"data/ffcv/loader.py"},
    "accelerate": {"distributed/environment.py", "training/tracking.py"},
    "deepspeed": {"distributed/environment.py", "training/deepspeed_engine.py"},
    "onnx": {"export/formats.py"},
    "onnxruntime": {"export/formats.py", "export/serve.py"},  # serve.py is copied beside ONNX files
    "huggingface_hub": {"export/hub.py"},
    "jinja2": {"report/html.py"},
    "matplotlib": {
        "report/figures.py",  # pixels for TensorBoard; pages draw their plots themselves
    },
}
# room -> rooms it may import from (beside itself); a room is a folder or a file of the package
BASE = {"errors", "fileio", "plugins", "config"}
ENGINE = BASE | {"distributed", "data", "models", "tasks", "training"}
ALLOWED = {
    "errors": set(),
    "fileio": {"errors"},
    "plugins": {"errors", "fileio"},
    "registry": {"errors", "plugins"},
    "config": {"errors", "fileio", "plugins"},
    "distributed": BASE,
    "data": BASE | {"distributed"},
    "models": BASE | {"distributed"},
    "tasks": BASE | {"registry", "data"},
    "training": BASE | {"distributed", "data", "tasks"},
    "pruning": {
        "errors",
        "plugins",
        "config",
    },  # config: parsing of plan files; a cost's name becomes a key of the target section
    "methods": {
        "errors",
        "plugins",
        "registry",
        "pruning",
        "config",
    },  # config: names of methods elsewhere, without torch
    "scoring": ENGINE | {"pruning"},
    "report": BASE | {"pruning", "tasks", "training"},
    "export": ENGINE | {"pruning"},
    "pipeline": ENGINE | {"pruning", "methods", "export"},
    "stages": ENGINE | {"pruning", "methods", "scoring", "report", "export", "pipeline"},
    "analysis": ENGINE | {"pruning", "methods", "scoring", "report", "pipeline", "stages"},
    "run": ENGINE | {"methods", "pipeline"},
    "api": ENGINE | {"pruning", "methods", "scoring", "export", "api_checks"},
    "api_checks": {"errors", "pruning", "methods"},
    "api_select": ENGINE | {"pruning", "methods", "scoring", "api_checks"},
    "__main__": {"cli"},
    "api_repair": ENGINE | {"pruning", "scoring", "api_checks"},
    "api_search": ENGINE | {"pruning", "methods", "scoring", "api_checks"},
    "cli": ENGINE | {"pruning", "methods", "report", "export", "pipeline", "analysis", "run"},
}
# the same within pruning/
INSIDE_PRUNING = {
    "repair": {"rng", "eval_mode", "module_calls", "graph", "hooks", "plan"},
    "rng": set(),
    "eval_mode": set(),
    "module_calls": set(),
    "shape_mode": set(),
    "network_output": {"shape_mode"},
    "figure_data": set(),
    "graph": {"rng", "eval_mode", "module_calls", "shape_mode", "network_output"},
    "hooks": {"rng", "eval_mode", "module_calls", "graph"},
    "plan": {"rng", "graph", "hooks"},
    "selection": {"rng", "graph", "hooks", "plan"},
    "surgery": {"rng", "eval_mode", "module_calls", "network_output", "graph", "hooks", "plan", "selection"},
    "information": {"rng", "graph", "hooks", "plan", "selection"},
    "sparse_learning": {"graph", "hooks", "plan", "selection"},
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


def room_of(module: str, folder: str = "dist_prune") -> str | None:
    """The file or folder directly below ``folder`` in which a module lies; None if it lies elsewhere."""
    return module[len(folder) + 1 :].split(".")[0] if module.startswith(f"{folder}.") else None


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_arrows_only_point_down(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = {room_of(module) for module in imports_of(file)} & ALLOWED.keys()
    if own == "__init__":  # for type checkers it names the library; at run time it imports nothing
        code = "import sys, dist_prune; sys.exit(any(name.startswith('dist_prune.') for name in sys.modules))"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
        return
    assert used - {own} <= ALLOWED[own], f"{name_of(file)} may not import {used - ALLOWED[own] - {own}}"
    if own == "pruning" and file.parent != PACKAGE / "pruning":
        inside = file.relative_to(PACKAGE / own).parts[0]
        used = {room_of(module, "dist_prune.pruning") for module in imports_of(file)} & INSIDE_PRUNING.keys()
        assert used - {inside} <= INSIDE_PRUNING[inside], f"{name_of(file)} may not import {used}"


def test_every_room_is_listed():
    below = {f.name.removesuffix(".py") for f in PACKAGE.iterdir() if f.suffix == ".py" or (f / "__init__.py").exists()}
    assert below == ALLOWED.keys() | {"__init__"}
    pruning = PACKAGE / "pruning"
    below = {f.name.removesuffix(".py") for f in pruning.iterdir() if f.suffix == ".py" or (f / "__init__.py").exists()}
    assert below == INSIDE_PRUNING.keys() | {"__init__"}


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
    shared_by_stages = {"calibration", "latency_target", "measuring", "ratio_search", "report_images", "training_setup"}
    for folder, shared in (("methods", set(methods.SHARED)), ("stages", shared_by_stages)):
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
        assert used <= sys.stdlib_module_names | {"dist_prune", "pydantic", "pydantic_core", "yaml"}, name_of(file)


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
    """A file is one noun: 250 lines are long, 500 are the end."""
    assert len(file.read_text().splitlines()) <= 500


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
    "module",
    [
        "dist_prune",
        "dist_prune.config.sweep",
        "dist_prune.pipeline.ledger",
        "dist_prune.fileio",
        "dist_prune.cli.doctor",
    ],
)
def test_these_import_no_torch_and_no_templates(module):
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'jinja2', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
