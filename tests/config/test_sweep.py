"""Sweep files, the script for SLURM, and what tasks of a sweep make once for all."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from dist_prune.cli.main import main
from dist_prune.config import sweep
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.preemption import PreemptedError
from dist_prune.errors import PruneError
from dist_prune.methods import options_of
from dist_prune.pipeline.artifact_store import ArtifactStore, Lease, make_or_take
from tests.support.launch import ROOT

SWEEP = """
tasks:
  - base: quickstart
    grid: {target.macs: [0.5, 0.6], seed: [0, 1]}
  - base: quickstart
    list: [{target.macs: 0.7}, {target.macs: null, select.threshold: 0.8}]
"""


def written(folder: Path, text: str = SWEEP) -> str:
    (folder / "small.yaml").write_text(text)
    return str(folder / "small.yaml")


def test_a_sweep_expands_in_one_order(tmp_path):
    found = sweep.load_sweep(written(tmp_path), options_of)
    assert [task.number for task in found.tasks] == list(range(6))
    assert [task.overrides for task in found.tasks[:4]] == [
        (f"target.macs={share}", f"seed={seed}") for share in (0.5, 0.6) for seed in (0, 1)
    ]
    assert found.tasks[1].name == "quickstart-macs_0.5-seed_1"
    assert found.tasks[5].overrides == ("target.macs=null", "select.threshold=0.8")
    with pytest.raises(PruneError, match=r"tasks 0 to 5, there is no 6 .*--array=0-5"):
        found.task(6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "a sweep is 'tasks:'"),
        ("tasks: [{base: quickstart, gird: {seed: [1]}}]", r"tasks\[0\].gird: unknown key. Did you mean 'grid'\?"),
        ("tasks: [{base: quickstart, grid: {seed: 1}}]", r"tasks\[0\].grid: write"),
        ("tasks: [{grid: {seed: [1]}}]", r"tasks\[0\]: write base: RECIPE"),
        ("tasks: [{base: quickstrat}]", "Did you mean 'quickstart'"),
        ("tasks: [{base: quickstart, grid: {sede: [1]}}]", "task 0 .*sede: unknown key. Did you mean 'seed'"),
        ("tasks: [{base: quickstart, grid: {method.combin: [sum]}}]", "method.combin: unknown key"),
        ("tasks: [{base: quickstart, grid: {seed: [1, 1]}}]", "tasks 0 and 1 are the same run"),
        ("tasks: [{base: quickstart, grid: {seed: [1]}, list: [{seed: 2}]}]", "seed is in grid and in list"),
    ],
)
def test_a_wrong_sweep_is_refused(tmp_path, text, said):
    with pytest.raises(PruneError, match=rf"(?s){said}"):
        sweep.load_sweep(written(tmp_path, text), options_of)


def test_a_task_is_a_recipe_and_a_place(tmp_path, monkeypatch):
    file = written(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    spec, place = sweep.choose_run(None, file, None, ["finetune.epochs=1"], options_of)
    assert (spec.name, spec.seed, spec.target.macs, spec.finetune.epochs) == ("quickstart-macs_0.6-seed_1", 1, 0.6, 1)
    assert place == Path("runs/small/quickstart-macs_0.6-seed_1")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    with pytest.raises(PruneError, match="name the task, --task N"):
        sweep.choose_run(None, file, None, [], options_of)


def test_where_a_run_lives_follows_its_keys(tmp_path, capsys, monkeypatch):
    """Jobs of one recipe under two names must not share a run directory."""
    monkeypatch.delenv("DIST_PRUNE_RUNS", raising=False)
    for words, place in (
        (["--recipe", "quickstart"], "runs/quickstart"),
        (["--recipe", "quickstart", "name=a", "target.macs=0.6"], "runs/a"),
        (["--sweep", written(tmp_path), "--task", "3", "seed=4"], "runs/small/quickstart-macs_0.6-seed_1"),
    ):
        assert main(["where", *words]) == 0
        assert capsys.readouterr().out.strip() == place


def test_the_script_for_slurm(tmp_path, capsys):
    """What is printed has the values in its header, and bash can read it."""
    assert main(["launch", "--slurm", "quickstart", "--nodes", "2", "--gpus", "4", "target.macs=0.6"]) == 0
    text = capsys.readouterr().out
    for line in ("--nodes=2", "--gpus-per-node=4", "--requeue", "--signal=USR1@180", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text
    assert "set -- quickstart target.macs=0.6\n" in text
    assert main(["launch", "--slurm", "--array", written(tmp_path), "--sbatch=--partition=long", "--gpus=0"]) == 0
    array = capsys.readouterr().out
    assert "#SBATCH --array=0-5\n" in array
    assert "#SBATCH --partition=long\n" in array
    assert "--gpus" not in array.partition("\n# ")[0]
    config = ROOT / "launch/gpu_8_zero2.yaml"
    assert main(["launch", "--slurm", "quickstart", "--accelerate", str(config)]) == 0
    assert f"export ACCELERATE_CONFIG={config}\n" in capsys.readouterr().out
    files = [ROOT / "slurm/run.sbatch", ROOT / "slurm/array.sbatch"]
    for script in (text, array, *(file.read_text() for file in files)):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
        assert all("=" in line or "--requeue" in line for line in script.splitlines() if line.startswith("#SBATCH"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quickstart", "target.mcas=1"], "Did you mean 'macs'"),
        ([], "name a recipe, or --array SWEEP"),
        (["quickstart", "--accelerate", "/nowhere.yaml"], "--accelerate: there is no file /nowhere.yaml"),
        (["quickstart", "--nodes", "0"], "--nodes: 0 is too few"),
        (["quickstart", "--array", "graph_cifar10"], "leave out 'quickstart' or --array"),
        (["--array", "graph_cifar"], "Did you mean 'graph_cifar10'"),
    ],
)
def test_a_wrong_launch_is_refused(capsys, words, said):
    assert main(["launch", "--slurm", *words]) == 2
    assert said in capsys.readouterr().err


def shelf(folder: Path, name: str, patience: float = 60) -> ArtifactStore:
    (folder / name).mkdir(exist_ok=True)
    return ArtifactStore(folder / "shared", folder / name, patience)


def make(folder: Path, text: str):
    def act():
        (folder / "scores").write_text(text)
        return {"by": text}

    return act


def use(shelf: ArtifactStore, act=None):
    act = act or make(shelf.owner, shelf.owner.name)
    return make_or_take(shelf, "score-1", ["scores"], Communicator(), act, shelf.owner, lambda text: None)


def test_one_makes_and_others_take(tmp_path):
    first, second = shelf(tmp_path, "a"), shelf(tmp_path, "b")
    assert use(first) == ({"by": "a"}, "")
    assert use(second) == ({"by": "a"}, str(tmp_path / "a"))
    assert (tmp_path / "b/scores").read_text() == "a"
    assert not list((tmp_path / "shared").glob("*.holder.*"))
    (tmp_path / "shared/score-1/scores").unlink()
    (tmp_path / "shared/score-1/scores").write_text("altered")
    with pytest.raises(PruneError, match="is damaged or was altered; delete it"):
        use(shelf(tmp_path, "c"))


def test_a_holder_that_is_alive_is_waited_for_and_a_dead_one_is_not(tmp_path):
    alive, waiting = shelf(tmp_path, "a"), shelf(tmp_path, "b", patience=0.3)
    hold = alive.try_lease("score-1")
    assert isinstance(hold, Lease)
    for _ in range(5):  # signs of life come
        os.utime(hold.file, ns=(0, time.time_ns()))
        assert str(tmp_path / "a") in str(waiting.try_lease("score-1"))
        time.sleep(0.1)
    assert isinstance(alive.try_lease("score-1"), Lease), "the same task, started again, goes on at once"
    time.sleep(0.4)  # and no more
    taken = waiting.try_lease("score-1")
    assert isinstance(taken, Lease)
    assert taken.file != hold.file
    assert str(tmp_path / "b") in str(alive.try_lease("score-1")), "who was given up waits like any other"


def test_who_is_given_up_and_finishes_later_takes_what_is_there(tmp_path):
    slow, fast = shelf(tmp_path, "a"), shelf(tmp_path, "b", patience=0)

    def overtaken():
        while isinstance(fast.try_lease("score-1"), str):
            time.sleep(0.01)
        use(fast)
        return make(tmp_path / "a", "a")()

    assert use(slow, overtaken) == ({"by": "b"}, str(tmp_path / "b"))
    assert (tmp_path / "a/scores").read_text() == "b"


@pytest.mark.parametrize(("error", "kept"), [(PreemptedError("asked"), True), (ValueError("a bug"), False)])
def test_a_preempted_holder_stays_and_a_failed_one_goes(tmp_path, error, kept):
    def fails():
        raise error

    with pytest.raises(type(error)):
        use(shelf(tmp_path, "a"), fails)
    assert len(list((tmp_path / "shared").glob("*.holder.0"))) == kept
    assert isinstance(shelf(tmp_path, "b").try_lease("score-1"), str if kept else Lease)
