"""``dist-prune launch --config``: prints or copies a launch config; and its names for batch scripts."""

import json

import pytest
import yaml

from dist_prune.cli.main import main
from tests.support.launch import ROOT

NAMES = sorted(file.stem for file in (ROOT / "launch").glob("*.yaml"))


@pytest.mark.parametrize("name", ["cpu_2", "gpu_8_zero2.yaml"])
def test_it_prints_the_file(name, capsys):
    assert main(["launch", "--config", name]) == 0
    file = ROOT / "launch" / f"{name.removesuffix('.yaml')}.yaml"
    assert capsys.readouterr().out.rstrip() == file.read_text().rstrip()


def test_it_copies_the_file_once_and_overwrites_no_other(capsys, tmp_path):
    place = tmp_path / "new" / "folder"
    for _ in range(2):
        assert main(["launch", "--config", "cpu_2", "--to", str(place), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["file"] == str(place / "cpu_2.yaml")
    assert yaml.safe_load((place / "cpu_2.yaml").read_text())["num_processes"] == 2
    (place / "cpu_2.yaml").write_text("num_processes: 3\n")
    assert main(["launch", "--config", "cpu_2", "--to", str(place)]) == 2
    assert "exists and differs" in capsys.readouterr().err
    assert (place / "cpu_2.yaml").read_text() == "num_processes: 3\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--config", "cpu2"), f"Did you mean 'cpu_2'? Allowed: {', '.join(NAMES)}."),
        (("--config", "../pyproject"), "unknown launch config"),
        (("--config", "cpu_2", "quickstart"), "--config prints a file as it is"),
        (("--config", "cpu_2", "--submit"), "--config prints a file as it is"),
        (("--slurm", "quickstart", "--to", "there"), "--to: it copies the file of --config"),
        (("--slurm", "quickstart", "--accelerate", "gpu8"), "--accelerate: unknown launch config 'gpu8'. Did you mean"),
        (("--slurm", "quickstart", "--accelerate", "no/where.yaml"), "--accelerate: there is no file no/where.yaml"),
    ],
)
def test_what_does_not_fit_is_said(words, said, capsys):
    assert main(["launch", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert main(["launch", "--config", "cpu_2", "--to", str(tmp_path / "file" / "in")]) == 2
    assert "--to: " in capsys.readouterr().err


def test_a_batch_script_takes_a_config_by_name(capsys):
    assert main(["launch", "--slurm", "quickstart", "--accelerate", "cpu_2"]) == 0
    assert f"export ACCELERATE_CONFIG={ROOT / 'launch/cpu_2.yaml'}" in capsys.readouterr().out


def test_the_help_lists_all_configs(capsys):
    with pytest.raises(SystemExit):
        main(["launch", "--help"])
    listed = "".join(capsys.readouterr().out.split())
    assert all(name in listed for name in NAMES)
