"""What stands on stdout: with --json a document and nothing else; a reader that has gone is no traceback."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.launch import ROOT, SMALL, environment

CLI = (sys.executable, "-m", "dist_prune.cli")


def said(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=200
    )


@pytest.mark.slow
def test_score_many_prints_its_table_alone(tmp_path):
    words = (*SMALL, "train.epochs=1", "score.images=20")
    done = said("score-many", "quickstart", *words, "--methods", "l1,l2", "--run-dir", str(tmp_path / "run"), "--json")
    assert done.returncode == 0, done.stderr
    assert [row["method"] for row in json.loads(done.stdout)] == ["l1", "l2"]
    assert "process(es) on" in done.stderr, "what is said meanwhile is not lost"


@pytest.mark.parametrize(
    "words", [("list", "keys"), ("list", "backbones", "--json"), ("check", "quickstart", "--json")]
)
def test_a_reader_that_has_gone_is_no_traceback(words):
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [*CLI, *words], cwd=ROOT, env=environment(), stdout=theirs, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(theirs)
    assert done.stderr == ""
    assert done.returncode == 0
