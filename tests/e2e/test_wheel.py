"""The wheel in an environment of its own: what README says works without a checkout, from an empty folder."""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.launch import ROOT, report
from tests.support.packages import OFFLINE, PIP

pytestmark = pytest.mark.slow
SMALL = (
    "backbone.name=resnet8p_cifar", "train.epochs=2", "finetune.epochs=1", "score.images=100",
    "report.latency_repeats=2", "report.latency_batches=[1]",
)  # fmt: skip


def call(command: list[str], folder: Path, **more: str) -> str:
    """A command in a folder, without this repository on any path; it has to end well."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WORLD_SIZE", "RANK", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=folder, env={**inherited, "OMP_NUM_THREADS": "1", **more}, capture_output=True, text=True,
        check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(source: Path, folder: Path) -> Path:
    call([*PIP, "wheel", *OFFLINE, "-w", str(folder), str(source)], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel; its dependencies are seen in this one, dist_prune is not."""
    place = tmp_path_factory.mktemp("environment") / "venv"
    call([sys.executable, "-m", "venv", "--without-pip", str(place)], place.parent)
    call([*PIP, "--python", str(place / "bin/python"), "install", *OFFLINE, str(wheel)], place.parent)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


@pytest.fixture
def empty(tmp_path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_dist_prune_is_that_of_the_wheel(installed, empty):
    code = "import dist_prune; print(dist_prune.__file__, dist_prune.__version__)"
    file, version = call([str(installed / "python"), "-c", code], empty).split()
    assert Path(file).is_relative_to(installed.parent) and version == "0.1.0"


def test_the_command_line_from_an_empty_folder(installed, empty):
    command = str(installed / "dist-prune")
    assert "launch" in call([command, "--help"], empty)
    recipes = json.loads(call([command, "list", "recipes", "--json"], empty))
    ours = {file.stem for file in (ROOT / "recipes").rglob("*.yaml") if file.parent.name != "sweeps"}
    assert set(recipes) == ours
    assert all(recipe["file"].startswith(str(installed.parent)) for recipe in recipes.values())
    assert "taylor" in call([command, "list", "methods"], empty)
    assert "groups are free" in call([command, "check", "quickstart"], empty)
    assert call([command, "launch", "--config", "cpu_2"], empty) == (ROOT / "launch/cpu_2.yaml").read_text()
    script = call([command, "launch", "--slurm", "quickstart", "--accelerate", "cpu_2"], empty)
    assert str(installed.parent) in script and "ACCELERATE_CONFIG" in script
    assert list(empty.iterdir()) == []


def test_the_quickstart_on_two_processes_from_an_empty_folder(installed, empty):
    call([str(installed / "dist-prune"), "launch", "--config", "cpu_2", "--to", "."], empty)
    launcher = [str(installed / "python"), "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    words = ["--config_file", "cpu_2.yaml", "-m", "dist_prune.run", "--recipe", "quickstart", *SMALL]
    call([*launcher, *words], empty)
    body = report(empty / "runs/quickstart")
    assert body["world_size"] == 2 and 0 < body["achieved"]["macs"] < 1
    load = "import dist_prune; print(type(dist_prune.load('runs/quickstart/export')).__name__)"
    assert call([str(installed / "python"), "-c", load], empty).strip() == "ResNetCifar"


def contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    call([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)], ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    (tmp_path / "out").mkdir()
    assert contents(built(source, tmp_path / "out")) == contents(wheel)


def test_the_wheel_has_recipes_launch_configs_and_batch_scripts_and_nothing_else_beside_the_code(wheel):
    names = set(contents(wheel))
    for folder, ending in (("recipes", "*.yaml"), ("launch", "*.yaml"), ("slurm", "*")):
        for file in (ROOT / folder).rglob(ending):
            if file.is_file():
                assert f"dist_prune/{file.relative_to(ROOT).as_posix()}" in names
    endings = {Path(name).suffix for name in names if name.startswith("dist_prune/")}
    assert endings <= {".py", ".yaml", ".sbatch", ".md", ".j2", ".css", ".js", ".typed"}, json.dumps(sorted(names))
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/"))]
