"""Whole runs with a hand on them: Ctrl-C, a launcher that is killed, a rank that sleeps, a directory of others."""

import os
import signal
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from dist_prune.config.loading import load
from dist_prune.distributed.watchdog import GRACE_S
from dist_prune.pipeline.ledger import Ledger, bind_recipe, lock_run_directory
from tests.distributed.test_error_summary import ONE
from tests.distributed.test_waiting import place, port
from tests.support.launch import ACCELERATE, PYTHON, RUN, SMALL, TORCHRUN, environment, run, start, wait_for

LONG = (*SMALL, "train.epochs=400", "train.save_every_steps=3")


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if RUN in child.cmdline()]


def gone(found: list[psutil.Process], seconds: float) -> bool:
    return not psutil.wait_procs(found, timeout=seconds)[1]


def saved(folder: Path) -> bool:
    return any(folder.glob("train_checkpoints/*.sha256"))


def test_ctrl_c_saves(tmp_path):
    folder = tmp_path / "run"
    process = start(PYTHON, folder, *LONG)
    wait_for(process, lambda: saved(folder))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped by SIGINT in train" in output.splitlines()[-1]
    assert "Traceback" not in output


@pytest.mark.slow
def test_ctrl_c_while_a_rank_waits_for_the_others(tmp_path):
    folder = tmp_path / "run"
    process = start(PYTHON, folder, *LONG, **place(1, 2, port()))  # waits where no handler of the main thread runs
    wait_for(process, lambda: listens(process.pid))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped by SIGINT while rank 1 of 2 waited for the others" in output


def listens(process: int) -> bool:
    """Whether SIGINT is caught by more than Python's own handler: SIGUSR1 is, as soon as the run listens."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def test_a_second_ctrl_c_is_heard_also_where_the_main_thread_is_busy():
    """One press may arrive twice, from the terminal and from a launcher: only a later one counts."""
    code = "import ctypes\nfrom dist_prune.distributed import preemption\n"
    code += "preemption.install_handlers()\nprint('on', flush=True)\n"
    code += "while True: ctypes.CDLL(None).sleep(60)\n"
    process = subprocess.Popen(
        [PYTHON[0], "-c", code], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    for pause in (0.3, 1.2):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    assert process.poll() is None, "the terminal's and the launcher's are one press"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert said == "error: interrupted twice: left at once, without saving\n"


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("importing", marks=pytest.mark.slow),
        "at the roll",
        pytest.param("training", marks=pytest.mark.slow),
    ],
)
def test_ranks_end_with_their_launcher(tmp_path, where):
    folder = tmp_path / "run"
    launcher = (*TORCHRUN[:-1], RUN)
    if where == "at the roll":  # the second node never comes; its launcher is not asked
        launcher = (PYTHON[0], "-c", HOLD, RUN)
    process = start(launcher, folder, *LONG)
    if where == "training":
        wait_for(process, lambda: saved(folder))
    else:
        wait_for(process, lambda: children(process))
        ranks = children(process)
        if where == "at the roll":
            wait_for(process, lambda: all(listens(rank.pid) for rank in ranks))
        else:
            time.sleep(0.5)
    ranks = children(process)
    assert ranks
    process.kill()
    began = time.monotonic()
    assert gone(ranks, 12), "ranks outlived their launcher"
    assert time.monotonic() - began < 12
    process.communicate()


def test_a_launcher_that_ended_before_its_rank_had_begun(tmp_path):
    """A loaded machine may start an interpreter so slowly: the parent is another one before anybody looks."""
    said = tmp_path / "said"
    said.touch()
    code = "from dist_prune.distributed import watchdog; import os, time; print(os.getppid(), flush=True)\n"
    code += "watchdog.start(); print('goes on', flush=True); time.sleep(20)\n"
    command = f'(sleep 0.5; exec {PYTHON[0]} -c "$CODE") > {said} 2>&1 &'
    variables = {**environment(), "CODE": code, "TORCHELASTIC_RUN_ID": "none"}
    subprocess.run(["bash", "-c", command], env=variables, check=True, cwd=Path(RUN).parents[1])
    deadline = time.monotonic() + 60
    while not any(sign in (text := said.read_text()) for sign in ("gone", "goes on")) and time.monotonic() < deadline:
        time.sleep(0.1)
    first = Path("/proc/1/cmdline").read_text(errors="replace")
    if text.split()[:1] != ["1"] or "python" in first or "torchrun" in first:
        pytest.skip("here an orphan's parent is not the first process, or that one is a Python program")
    assert "the launcher was gone before this process had begun" in text and "goes on" not in text


HOLD = """
import os, socket, subprocess, sys
with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
more = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, **more}).wait()
"""


@pytest.mark.slow
def test_a_run_without_a_launcher_outlives_its_shell(tmp_path):
    """nohup: the shell that started it goes, the run stays."""
    folder = tmp_path / "run"
    words = " ".join(f"'{word}'" for word in (*PYTHON, "--recipe", "quickstart", "--run-dir", str(folder), *LONG))
    done = subprocess.run(
        ["bash", "-c", f"{words} > /dev/null 2>&1 & echo $!"],
        env=environment(), capture_output=True, text=True, check=True, cwd=Path(RUN).parents[1],
    )  # fmt: skip
    found = psutil.Process(int(done.stdout))
    deadline = time.monotonic() + 100
    while not saved(folder) and found.is_running() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found.is_running() and saved(folder)
    found.kill()


@pytest.mark.slow
def test_a_refused_launch_leaves_the_run_of_others_as_it_is(tmp_path):
    folder = tmp_path / "run"
    spec = load("quickstart", [*SMALL, "train.epochs=7"])
    bind_recipe(folder, spec.resolved())
    Ledger(folder).append({"stage": "train", "fingerprint": "f", "outputs": {}})
    (folder / "report.json").write_text("{}")
    with lock_run_directory(folder):  # as the run that made it did
        pass
    before = state(folder)
    for held, said in (
        (lock_run_directory(folder), "another process is running in"),
        (nullcontext(), "belongs to another recipe"),
    ):
        with held:
            code, output = run(PYTHON, folder, *SMALL)
        assert code == 2
        assert said in output
        assert state(folder) == before, "compare would list it as not finished"


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_rank_that_was_stopped_says_that_it_was_late(tmp_path):
    at = port()
    words = (*LONG, "cluster.timeout_s=10")
    ranks = [start(PYTHON, tmp_path / "run", *words, **place(rank, 2, at)) for rank in (0, 1)]
    wait_for(ranks[0], lambda: saved(tmp_path / "run"))
    ranks[1].send_signal(signal.SIGSTOP)
    first, _ = ranks[0].communicate(timeout=60)
    ranks[1].send_signal(signal.SIGCONT)
    second, _ = ranks[1].communicate(timeout=60)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "No word from rank 1" in first
    assert "rank 1 of 2 was late for a" in second
    assert "this process stood still for" in second
    assert "network" not in second
    assert os.listdir(tmp_path / "run" / "train_checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ONE, ACCELERATE], ids=["1 rank", "2 ranks"])
def test_a_launcher_that_is_asked_to_stop_leaves_time_to_save(tmp_path, launcher):
    """SIGTERM to accelerate launch: it passes it on (2 ranks), or ends and its rank notices; all save in time."""
    folder = tmp_path / "run"
    process = start(launcher, folder, *LONG)
    wait_for(process, lambda: saved(folder))
    ranks, began = children(process), time.monotonic()
    assert len(ranks) == (1 if launcher is ONE else 2)
    process.send_signal(signal.SIGTERM)
    assert gone(ranks, GRACE_S), "no rank was killed: each had saved before"
    assert time.monotonic() - began < GRACE_S
    output, _ = process.communicate(timeout=60)
    assert "stopped by" in output and " in train" in output, output
    assert process.returncode != 0
    process = start(launcher, folder, *LONG)
    said = ""
    assert process.stdout is not None
    while "resumes after epoch" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


@pytest.mark.slow
def test_a_launcher_s_stop_changes_no_bit(tmp_path):
    """SIGTERM to accelerate launch of two processes while they finetune; the next start ends at the same weights."""
    words = (*SMALL, "finetune.epochs=6", "finetune.ema=0.9", "finetune.save_every_steps=3", "data.augment=crop")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, output = run(ACCELERATE, whole, *words)
    assert code == 0, output
    process = start(ACCELERATE, cut, *words)
    wait_for(process, lambda: any(cut.glob("finetune_checkpoints/*.sha256")))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "stopped by" in output and not (cut / "finetuned.safetensors").exists(), output
    code, output = run(ACCELERATE, cut, *words)
    assert code == 0 and "finetune: resumes after epoch" in output, output
    ends = [{stage: Ledger(folder).last(stage) for stage in ("train", "score", "finetune")} for folder in (whole, cut)]
    assert ends[0]["finetune"] is not None
    for stage, line in ends[0].items():
        other = ends[1][stage]
        assert line is not None and other is not None and line["outputs"] == other["outputs"], stage
