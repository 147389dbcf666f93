"""Jobs on a real SLURM: two nodes, an array that shares one score, preemption in scoring and in training."""

import contextlib
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from dist_prune.cli.comparison import collect
from dist_prune.pipeline.ledger import Ledger
from tests.e2e.test_run_forms import WORDS as WORDS_OF_SHARDS
from tests.e2e.test_run_forms import shards as shards  # a fixture
from tests.support.cluster import Cluster, cluster
from tests.support.launch import PYTHON, ROOT, SMALL, TORCHRUN, report, run

pytestmark = pytest.mark.slurm
LONG = (
    *SMALL, "score.images=1347", "score.micro_batch=2", "score.save_every=5", "finetune.epochs=8",
    "finetune.save_every_steps=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of two ranks under torchrun."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, output = run(TORCHRUN, folder, *LONG)
    assert code == 0, output
    return folder


def submit(slurm: Cluster, *words: str, folder: Path | None = None, **more: str) -> str:
    """The job that ``dist-prune launch --slurm --submit`` started in the cluster's folder."""
    more |= {"RUN_DIR": str(folder)} if folder is not None else {}
    text = slurm.do(
        sys.executable, "-m", "dist_prune.cli", "launch", "--slurm", "--submit", "--json", "--gpus", "0",
        *words, PYTHONPATH=str(ROOT), **more,
    )  # fmt: skip
    return json.loads(text)["job"]


def end_of(folder: Path) -> tuple[Any, ...]:
    """What must not depend on how a run was interrupted: plan and weights."""
    line = Ledger(folder).last("finetune")
    assert line is not None
    return report(folder)["plan"]["fingerprint"], line["outputs"]


def test_the_doctor_asks_the_cluster(slurm, tmp_path):
    """What it says of a controller that answers, and of one that does not."""

    def findings(**more: str) -> dict[str, dict[str, str]]:
        done = subprocess.run(
            [sys.executable, "-m", "dist_prune.cli", "doctor", "--json"],
            env=slurm.environment(PYTHONPATH=str(ROOT)) | more, capture_output=True, text=True, check=False,
            cwd=slurm.folder, timeout=120,
        )  # fmt: skip
        return {line["name"]: line for line in json.loads(done.stdout)}

    found = findings()
    assert found["SLURM partitions"]["state"] == "ok"
    assert "all: 2 node(s)" in found["SLURM partitions"]["detail"]
    assert found["SLURM GPUs"]["state"] == "note"
    assert found["runs on all nodes"]["state"] in ("ok", "note")
    (tmp_path / "slurm.conf").write_text((slurm.folder / "slurm.conf").read_text().replace("ClusterName=", "Wrong="))
    lost = findings(SLURM_CONF=str(tmp_path / "slurm.conf"))
    assert lost["SLURM controller"]["state"] == "missing"
    assert "SLURM_CONF" in lost["SLURM controller"]["mend"]
    assert "SLURM partitions" not in lost


def test_a_job_s_place_follows_the_run_s_name(slurm):
    """Two names of one recipe are two run directories, in SLURM as without it."""
    runs = slurm.folder / "places"
    jobs = [submit(slurm, "quickstart", f"name={name}", *SMALL, DIST_PRUNE_RUNS=str(runs)) for name in "ab"]
    for job in jobs:
        slurm.finish(job)
    assert [(runs / name / "report.json").is_file() for name in "ab"] == [True, True], slurm.said()
    assert sorted(folder.name for folder in runs.iterdir()) == ["a", "b"]


def test_two_nodes(slurm, whole, tmp_path):
    folder = tmp_path / "run"
    job = submit(slurm, "quickstart", "--nodes", "2", *LONG, folder=folder)
    slurm.finish(job)
    assert (folder / "report.json").is_file(), slurm.said()
    assert report(folder)["world_size"] == 2
    assert end_of(folder) == end_of(whole)
    logs = folder / "slurm" / f"{job}.0"
    for node in (0, 1):  # a log for each process, under its node's rank
        assert list(logs.glob(f"node_{node}/*/attempt_0/0/stdout.log")), node
    assert "#SBATCH --nodes=2" in (logs / "script").read_text()
    assert (logs / "code.patch").read_text().strip()
    with tarfile.open(logs / "code.tar.gz") as kept:
        names = kept.getnames()
    assert {"dist_prune/run.py", "recipes/quickstart.yaml"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]
    assert (folder / "recipe.yaml").is_file()


def test_two_nodes_read_shards_from_their_own_disks(slurm, shards, tmp_path):
    """``STAGE_TO`` names a variable of the node, which its processes fill in; the run's recipe keeps it."""
    words = (*WORDS_OF_SHARDS, f"data.root={shards}")
    job = submit(
        slurm, "quickstart", "--nodes", "2", *words, folder=tmp_path / "run", STAGE_TO="${NODE_DISK}",
        NODE_DISK=str(tmp_path / "disk"),
    )  # fmt: skip
    slurm.finish(job)
    assert (tmp_path / "run" / "report.json").is_file(), slurm.said()
    assert report(tmp_path / "run")["world_size"] == 2
    assert len(list((tmp_path / "disk").rglob("toy-*.tar"))) == 2
    assert "stage_to: ${NODE_DISK}" in (tmp_path / "run" / "recipe.yaml").read_text()
    code, output = run(TORCHRUN, tmp_path / "here", *words)
    assert code == 0, output
    assert report(tmp_path / "here")["plan"]["fingerprint"] == report(tmp_path / "run")["plan"]["fingerprint"]


def test_two_nodes_by_accelerate(slurm, whole, tmp_path):
    """The same job, started by accelerate on each node instead of torchrun."""
    folder, config = tmp_path / "run", str(ROOT / "launch/cpu_2.yaml")
    job = submit(slurm, "quickstart", "--nodes", "2", "--accelerate", config, *LONG, folder=folder)
    slurm.finish(job)
    assert (folder / "report.json").is_file(), slurm.said()
    assert report(folder)["world_size"] == 2
    assert end_of(folder) == end_of(whole)
    assert "accelerate.commands.launch" in (folder / "slurm" / f"{job}.0" / "script").read_text()


def test_a_node_that_never_comes_is_named(slurm, tmp_path):
    """Python hangs on the second node before it says a word (a file system that does not answer does that)."""
    folder, wrapper = tmp_path / "run", tmp_path / "python"
    wrapper.write_text(f'#!/bin/bash\n[ "${{SLURM_NODEID:-0}}" = 1 ] && sleep 1000\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)

    def job(python: str) -> str:
        found = slurm.do(
            "sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", f"--output={slurm.folder}/slurm-%j.out",
            str(ROOT / "slurm/run.sbatch"), "quickstart", *SMALL,
            RUN_DIR=str(folder), DIST_PRUNE_CODE=str(ROOT), PYTHON=python, JOIN_TIMEOUT="15",
        )  # fmt: skip
        slurm.finish(found)
        return (slurm.folder / f"slurm-{found}.out").read_text()

    began = time.monotonic()
    said = job(str(wrapper))
    assert "python did not start within 15 s (JOIN_TIMEOUT) on: n2." in said, said
    assert "failed with" in said and "requeued" not in said
    assert time.monotonic() - began < 120
    job(sys.executable)
    assert (folder / "report.json").is_file(), slurm.said()


def back(slurm, node: str) -> bool:
    """Whether a node is up again: its daemon brings it back at the next registration, an operator may be faster."""
    if "down" not in slurm.do("sinfo", "-h", "-n", node, "-o", "%T"):
        return True
    with contextlib.suppress(AssertionError):  # refused where the daemon was faster
        slurm.do("scontrol", "update", f"NodeName={node}", "State=RESUME")
    return False


@pytest.mark.parametrize("how", ["USR1", "requeue", "node down"])
def test_stopped_while_scoring_and_while_training_it_goes_on(slurm, whole, tmp_path, how):
    """USR1, as before a time limit: saved, requeued by the script. Requeued by an operator, or a node lost: ended."""
    folder = tmp_path / "run"
    job = submit(slurm, "quickstart", "--nodes", "2", *LONG, folder=folder)
    for count, sign in enumerate(("round_1/partial/observation_1.safetensors", "finetune_checkpoints/*.sha256"), 1):
        slurm.wait(lambda sign=sign: any(folder.glob(sign)), f"{sign} is there")
        if how == "USR1":
            slurm.do("scancel", "--signal=USR1", job)
        elif how == "requeue":
            slurm.do("scontrol", "requeue", job)
        else:
            slurm.do("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
            slurm.wait(lambda: back(slurm, "n2"), "n2 is back")
        log = folder / "slurm" / f"{job}.{count}"
        slurm.wait(log.is_dir, f"start {count} of job {job}")
        if how == "USR1":
            said = (slurm.folder / f"slurm-{job}.out").read_text()
            assert f"stopped by SIGUSR1 {'while scoring' if count == 1 else 'in finetune'}" in said
    slurm.finish(job)
    assert (folder / "report.json").is_file(), slurm.said()
    assert end_of(folder) == end_of(whole)
    line = Ledger(folder).last("score")
    assert line is not None
    assert any(event["event"] == "resumed" for event in line["events"])


def test_an_array_shares_one_dense_network_and_one_score(slurm, tmp_path):
    """Of four tasks one trains and scores, three wait and take; each is the run it would be alone. A fifth fails."""
    sweep, runs = tmp_path / "small.yaml", tmp_path / "runs"
    grid = "{target.macs: [0.5, 0.6], finetune.lr: [0.01, 0.03]}"
    sweep.write_text(
        f"tasks:\n  - base: quickstart\n    grid: {grid}\n  - base: quickstart\n    list: [{{target.macs: 1.0e-05}}]\n"
    )
    job = submit(slurm, "--array", str(sweep), *SMALL, DIST_PRUNE_RUNS=str(runs))
    slurm.finish(job)
    folders = sorted((runs / "small").glob("quickstart-*-lr_*"))
    assert len(folders) == 4
    made = {"train": [], "score": []}
    for folder in folders:
        assert (folder / "report.json").is_file(), slurm.said()
        for stage, by in made.items():
            line = Ledger(folder).last(stage)
            assert line is not None
            taken = [event["from"] for event in line["events"] if event["event"] == "taken"]
            by.append(taken[0] if taken else str(folder))
    for stage, by in made.items():
        assert len(set(by)) == 1, f"{stage} was made by {set(by)}"
    assert len({report(folder)["plan"]["fingerprint"] for folder in folders}) == 2, "two targets, two plans"
    found = collect([runs / "small"])
    assert len(found.rows) == 4
    assert [item["run"] for item in found.unfinished] == ["quickstart-macs_1e-05"]
    assert "reachable range" in found.unfinished[0]["why"]
    assert "requeued" not in (slurm.folder / f"slurm-{job}_4.out").read_text()
    again = slurm.do(  # by hand, with the file of the repository: a finished task is skipped
        "sbatch", "--parsable", "--array=0", "--gpus-per-node=0", f"--output={slurm.folder}/slurm-%A_%a.out",
        str(ROOT / "slurm/array.sbatch"), str(sweep), *SMALL,
        DIST_PRUNE_RUNS=str(runs), DIST_PRUNE_CODE=str(ROOT), PYTHON=sys.executable,
    )  # fmt: skip
    slurm.finish(again)
    assert (slurm.folder / f"slurm-{again}_0.out").read_text().count("done before, skipped") == 8
    alone = tmp_path / "alone"
    code, output = run(PYTHON, alone, *SMALL, "target.macs=0.6", "finetune.lr=0.03")
    assert code == 0, output
    assert end_of(alone) == end_of(runs / "small" / "quickstart-macs_0.6-lr_0.03")
