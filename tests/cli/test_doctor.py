"""What doctor says where FFCV cannot be used: the error of the import, and the piece of its build that is missing."""

import os
import sys

from dist_prune.cli import doctor


def test_a_missing_piece_of_ffcv_is_named(tmp_path, monkeypatch):
    """Real commands: a pkg-config that knows OpenCV but no turbojpeg, and no compiler on the path."""
    program = tmp_path / "pkg-config"
    program.write_text('#!/bin/sh\ncase "$*" in *libturbojpeg*) exit 1;; *) echo 4.6.0;; esac\n')
    program.chmod(0o755)
    (tmp_path / "ffcv.py").write_text("raise ImportError('libturbojpeg.so.0: cannot open shared object file')\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/nowhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name == "ffcv" or name.startswith("ffcv.")]:
        monkeypatch.delitem(sys.modules, name)
    found = {item["name"]: item for item in doctor.run_checks() if item["name"].startswith("ffcv")}
    assert "libturbojpeg.so.0" in found["ffcv"]["detail"]
    assert "make ffcv" in found["ffcv"]["mend"]
    states = {name: item["state"] for name, item in found.items()}
    assert states == {
        "ffcv": "missing", "ffcv: g++": "missing", "ffcv: pkg-config": "ok", "ffcv: turbojpeg": "missing",
        "ffcv: opencv": "ok",
    }  # fmt: skip
    assert found["ffcv: turbojpeg"]["mend"] == "apt-get install libturbojpeg0-dev"
    assert not any(item["needed"] for item in found.values()), "a machine without FFCV runs everything else"


def test_ffcv_that_works_is_one_line(ffcv):
    assert [item["state"] for item in doctor.run_checks() if item["name"].startswith("ffcv")] == ["ok"]


def test_wheels_of_a_package_that_has_none_at_the_index_are_made():
    """What is downloaded has wheels; DeepSpeed comes as source alone."""
    gone = [{"name": name, "state": "missing"} for name in ("torch-pruning", "deepspeed")]
    (line,) = doctor._wheels(gone)
    download, build, install = line["mend"].split("; ")
    assert "torch-pruning" in download and "deepspeed" not in download
    assert build.startswith("pip wheel ") and "deepspeed" in build
    assert "--no-index wheels/*.whl" in install
    assert "pip wheel" not in doctor._wheels(gone[:1])[0]["mend"]
