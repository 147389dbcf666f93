"""``dist-prune launch --slurm``: what the batch script asks for. tests/e2e/test_slurm*.py run such scripts."""

import subprocess
from typing import Any

import pytest

from dist_prune.cli.main import main
from tests.support.launch import ROOT


def script(capsys: Any, *words: str) -> list[str]:
    assert main(["launch", "--slurm", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("words", "cores"),
    [
        (("quickstart",), 3),
        (("quickstart", "data.workers=0"), 1),
        (("quickstart", "--gpus", "8", "data.workers=7"), 64),
        (("quickstart", "--gpus", "0", "--processes", "4"), 12),
        (("quickstart", "--gpus", "8", "--cpus", "20"), 20),
        (("--array", "graph_cifar10", "--gpus", "2", "data.workers=5"), 12),
    ],
)
def test_a_core_for_each_process_and_each_loader_worker(words, cores, capsys):
    lines = script(capsys, *words)
    assert f"#SBATCH --cpus-per-task={cores}" in lines
    assert any("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in line for line in lines)


def test_each_setting_is_a_line_and_sbatch_s_own_come_last(capsys):
    lines = script(
        capsys, "quickstart", "--mem", "64GB", "--time", "1-12:00:00", "--account", "lab", "--qos", "low",
        "--partition", "long", "--exclusive", "--sbatch=--mem=32G",
    )  # fmt: skip
    header = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"--mem=64G", "--time=1-12:00:00", "--account=lab", "--qos=low", "--partition=long", "--exclusive"} <= {
        *header
    }
    assert header[-1] == "--mem=32G"
    plain = script(capsys, "quickstart")
    assert not [line for line in plain if line.startswith(("#SBATCH --mem", "#SBATCH --time", "#SBATCH --ex"))]


def test_an_array_may_run_few_tasks_at_a_time(capsys):
    assert "#SBATCH --array=0-23%2" in script(capsys, "--array", "graph_cifar10", "--jobs", "2")
    assert "#SBATCH --array=0-23" in script(capsys, "--array", "graph_cifar10")


@pytest.mark.parametrize(
    ("image", "engine"),
    [("nvcr.io#nvidia/pytorch:25.01-py3", "pyxis"), ("docker://x/y:1", "apptainer"), ("/images/own.sif", "apptainer")],
)
def test_a_container_is_started_by_what_its_name_belongs_to(image, engine, capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((ROOT / "recipes/quickstart.yaml").read_text())
    lines = script(capsys, str(recipe), "--container", image, "--mount", "/data", "--mount", "/a:/b", "--gpus", "2")
    own = lines[: lines.index(next(line for line in lines if line.startswith("set --")))]
    exports = dict(line.removeprefix("export ").split("=", 1) for line in own if line.startswith("export "))
    assert exports["CONTAINER"].strip("'") == image and exports["CONTAINER_ENGINE"] == engine
    assert exports["PYTHON"] == "python", "the container's, not this machine's"
    assert exports["CONTAINER_MOUNTS"] == f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},/data:/data,/a:/b"
    assert exports["CONTAINER_GPUS"] == "2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("quickstart", "--time", "soon"), "--time: 'soon' is no time limit; write minutes, HH:MM:SS or D-HH:MM:SS"),
        (("quickstart", "--mem", "0G"), "--mem: '0G' is no size"),
        (("quickstart", "--account", "a b"), "--account: 'a b' is no single word"),
        (("quickstart", "--qos", "x\n#SBATCH --nodes=9"), "--qos: 'x\\n#SBATCH --nodes=9' is no single word"),
        (("quickstart", "--jobs", "2"), "--jobs: it limits the tasks of --array SWEEP"),
        (("--array", "graph_cifar10", "--jobs", "0"), "--jobs: 0 is too few"),
        (("quickstart", "--mount", "/data"), "--mount: it belongs to --container IMAGE"),
        (("quickstart", "--engine", "pyxis"), "--engine: it belongs to --container IMAGE"),
        (("quickstart", "--container", "i", "--mount", "data"), "--mount: 'data': write /FOLDER"),
        (("quickstart", "--container", "x/y", "--engine", "apptainer"), "for example docker://x/y"),
        (("quickstart", "--container", "x/y.sif", "--engine", "pyxis"), "--engine: x/y.sif is an image of apptainer"),
        (("quickstart", "--runs", "there"), "--runs: --slurm has no such setting; it goes with --kubernetes or"),
        (("quickstart", "--gpus", "-1"), "--gpus: -1 is too few; at least 0"),
    ],
)
def test_what_does_not_fit_is_said(words, said, capsys):
    assert main(["launch", "--slurm", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_repository_s_script_is_valid_bash():
    for file in sorted((ROOT / "slurm").glob("*.sbatch")):
        assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0, file
