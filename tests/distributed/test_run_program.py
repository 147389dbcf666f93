"""Printed commands start a run where they are printed."""

import shlex
import subprocess
import sys

from dist_prune.distributed.run_program import run_program
from tests.support.launch import ROOT, environment


def test_in_a_checkout_it_is_a_path_and_elsewhere_a_module_that_starts(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert run_program() == "dist_prune/run.py"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dist_prune").mkdir()
    (tmp_path / "dist_prune" / "run.py").touch()
    assert run_program() == "-m dist_prune.run", "another file of that name"
    done = subprocess.run(
        [sys.executable, *shlex.split(run_program()), "--recipe", "resnt50_graph"],
        cwd=tmp_path.parent, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Did you mean 'resnet50_graph'" in done.stderr
