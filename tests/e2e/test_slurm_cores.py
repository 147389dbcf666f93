"""On a real SLURM that binds tasks to cores: a job sees the cores it asked for. Containers by stand-in programs."""

import os
import sys
from pathlib import Path

import pytest

from tests.e2e.test_slurm import submit
from tests.support.cluster import Cluster, cluster
from tests.support.launch import ROOT, SMALL, report

pytestmark = pytest.mark.slurm
# python of the job: says how many cores a process has instead of starting the ranks
WRAPPER = """#!/bin/bash
case "$*" in
*torch.distributed.run*) exec {python} -c 'import os; print("CORES", len(os.sched_getaffinity(0)))' ;;
esac
exec {python} "$@"
"""
# apptainer is not here: this checks its words and runs the command outside
APPTAINER = """#!/bin/bash
[ "$1" = exec ] || exit 3
shift
while :; do case "$1" in
--bind) bound=$2; shift 2 ;;
--pwd) cd "$2" || exit 3; shift 2 ;;
*) break ;;
esac; done
echo "apptainer $1 $bound" >>{log}
shift
exec "$@"
"""
# srun without pyxis: checks its three options, and starts the step without them
SRUN = """#!/bin/bash
words=()
for word in "$@"; do case "$word" in --container-*) echo "$word" >>{log} ;; *) words+=("$word") ;; esac; done
exec {srun} "${{words[@]}}"
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core: a job that sees two of them cannot be told from one that sees all")
    with cluster(tmp_path_factory.mktemp("cores"), "task/affinity") as found:
        yield found


def program(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("workers", [0, 1])
def test_a_job_sees_the_cores_it_asked_for(slurm: Cluster, tmp_path, workers):
    python = program(tmp_path / "python", WRAPPER.format(python=sys.executable))
    script = slurm.do(
        sys.executable, "-m", "dist_prune.cli", "launch", "--slurm", "--gpus", "0", "quickstart",
        f"data.workers={workers}", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    script = script.replace(f"export PYTHON={sys.executable}", f"export PYTHON={python}")
    assert str(python) in script
    file = program(tmp_path / "job", script)
    job = slurm.do("sbatch", "--parsable", str(file), RUN_DIR=str(tmp_path / "run"))
    slurm.finish(job)
    assert f"CORES {1 + workers}\n" in (slurm.folder / f"slurm-{job}.out").read_text(), slurm.said()


@pytest.mark.parametrize("engine", ["apptainer", "pyxis"])
def test_a_job_in_a_container(slurm: Cluster, tmp_path, engine):
    """The command that a container gets, run without one: neither engine can be installed here."""
    folder, log = tmp_path / "run", tmp_path / "log"
    srun = slurm.do("which", "srun")
    tools = tmp_path / "tools"
    program(tools / "apptainer", APPTAINER.format(log=log))
    if engine == "pyxis":
        program(tools / "srun", SRUN.format(log=log, srun=srun))
    program(tools / "python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    job = submit(
        slurm, "quickstart", "--container", "image", "--engine", engine, "--mount", "/data:/images", "data.workers=0",
        *SMALL, folder=folder, PATH=f"{tools}:{os.environ['PATH']}",
    )  # fmt: skip
    slurm.finish(job)
    assert (folder / "report.json").is_file(), slurm.said()
    assert report(folder)["world_size"] == 1
    mounts = f"{ROOT}:{ROOT},/data:/images,{folder}:{folder}"
    said = log.read_text().splitlines()
    if engine == "apptainer":
        assert set(said) == {f"apptainer image {mounts}"}
    else:
        assert set(said) == {
            "--container-image=image", f"--container-mounts={mounts}", f"--container-workdir={ROOT}",
        }  # fmt: skip
    assert (folder / "slurm" / f"{job}.0" / "container").read_text() == "image\n"
