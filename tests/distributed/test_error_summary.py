"""What a person reads last when a run stops under a real launcher: the run's own sentence, and the same exit code."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dist_prune.distributed import error_summary
from tests.support.launch import ACCELERATE, ROOT, RUN, SMALL, TORCHRUN, run

ONE = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", RUN)


def left() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"dist_prune-{os.getuid()}-*"))


@pytest.mark.parametrize(
    ("launcher", "traceback"),
    [
        pytest.param(ONE, "CalledProcessError", id="accelerate_1", marks=pytest.mark.slow),
        pytest.param(ACCELERATE, "ChildFailedError", id="accelerate_2"),
        pytest.param(TORCHRUN, "ChildFailedError", id="torchrun_2", marks=pytest.mark.slow),
    ],
)
def test_the_last_line_is_ours_and_not_the_launcher_s(launcher, traceback, tmp_path):
    before = left()
    code, output = run(launcher, tmp_path / "run", recipe="resnt50_graph")
    assert code == 1  # the launcher's, as ever
    assert traceback in output
    last = output.rstrip().rpartition(traceback)[2].splitlines()[-1]
    assert "error: no recipe file at 'resnt50_graph'. Did you mean 'resnet50_graph'" in last
    assert left() == before


def test_a_wrong_option_is_the_last_word_too():
    code, output = run(ONE, None, "--recpie", "quickstart")
    assert code == 1
    assert "--recipe --sweep is required" in output.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ONE, ACCELERATE], ids=["accelerate_1", "accelerate_2"])
def test_a_missed_target_and_an_error_within_a_run_are_the_last_words(launcher, tmp_path):
    code, output = run(launcher, tmp_path / "run", *SMALL, "target.macs=0.0001")
    assert code == 1
    assert "target.macs: 0.0001 cannot be reached" in output.rstrip().rpartition("above are the launcher's")[2]


def test_without_a_launcher_nothing_is_said_twice(tmp_path):
    code, output = run((sys.executable, RUN), tmp_path / "run", recipe="resnt50_graph")
    assert code == 2
    assert output.count("no recipe file") == 1


@pytest.mark.parametrize(
    ("words", "launches"),
    [
        (["/usr/bin/python3", "/opt/bin/accelerate", "launch", "x.py"], True),
        (["python", "-u", "-X", "dev", "-m", "accelerate.commands.launch", "x.py"], True),
        (["python3.11", "-m", "torch.distributed.run", "x.py"], True),
        (["torchrun", "x.py"], True),
        (["python", "dist_prune/run.py", "accelerate"], False),
        (["bash", "-c", "accelerate launch x.py"], False),
        (["timeout", "5", "accelerate", "launch"], False),
        ([""], False),
    ],
)
def test_who_is_a_launcher(words, launches):
    assert error_summary._is_launcher(words) is launches


def test_causes_come_before_consequences_and_once():
    lost = {"text": "lost", "rank": 0, "cause": False, "at": 1.0}
    assert error_summary.merge_notes([lost]) == "lost"
    full = [{"text": "disk full", "rank": rank, "cause": True, "at": 2.0 + rank} for rank in (1, 2)]
    assert error_summary.merge_notes([lost, *full]) == "disk full"
    other = {"text": "no such file", "rank": 3, "cause": True, "at": 2.5}
    assert error_summary.merge_notes([lost, other, *full]) == "[rank 3] no such file\n[rank 1] disk full"


def test_a_launcher_that_starts_the_processes_again_and_succeeds_ends_without_a_word(tmp_path):
    """torchrun restarts what failed: the writer of the first attempt must not tell of it at the end."""
    script = tmp_path / "work.py"
    script.write_text(
        "import os, sys\nfrom dist_prune.distributed import error_summary\nerror_summary.clear()\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    error_summary.record('error: first attempt', int(os.environ['RANK']))\n"
        "    os._exit(2)\nprint('well done')\n"
    )
    command = [*TORCHRUN[:-1], "--max-restarts", "1", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "well done" in done.stdout
    assert "first attempt" not in done.stderr
