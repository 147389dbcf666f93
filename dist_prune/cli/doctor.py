"""``dist-prune doctor``: installed and missing packages and programs, and the command that repairs each."""

import argparse
import importlib
import os
import platform
import shutil
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dist_prune.cli.verb import Answer

PACKAGES = (
    # distribution, needed by every run, purpose, command that installs it
    ("torch", True, "everything", "pip install -c constraints.txt torch torchvision"),
    ("torchvision", True, "image transforms and data sets", "pip install -c constraints.txt torchvision"),
    ("timm", True, "backbones", "pip install -c constraints.txt timm"),
    ("torch-pruning", True, "channel groups and surgery", "pip install -c constraints.txt torch-pruning"),
    ("accelerate", True, "launching on many processes", "pip install -c constraints.txt accelerate"),
    ("safetensors", True, "weights on disk", "pip install -c constraints.txt safetensors"),
    ("tensorboard", True, "curves while a run works", "pip install -c constraints.txt tensorboard"),
    ("scikit-learn", True, "the digits data set", "pip install -c constraints.txt scikit-learn"),
    ("deepspeed", False, "ZeRO (launch/gpu_8_zero2.yaml)", "pip install -c constraints.txt -e '.[deepspeed]'"),
    ("onnxruntime", False, "dist-prune export", "pip install -c constraints.txt -e '.[onnx]'"),
    ("transformers", False, "accelerate's DeepSpeed integration", "pip install -c constraints.txt -e '.[deepspeed]'"),
)
OFFLINE = "without a network"  # name of the line about wheels
NO_WHEELS = ("deepspeed",)  # at the package index; pip makes them
SHARED_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "gfs2", "ocfs2", "wekafs", "panfs", "9p")
FFCV_PIECES = (
    # name, a command that prints its version if it is installed, Debian's package
    ("g++", ("g++", "--version"), "g++"),
    ("pkg-config", ("pkg-config", "--version"), "pkg-config"),
    ("turbojpeg", ("pkg-config", "--modversion", "libturbojpeg"), "libturbojpeg0-dev"),
    ("opencv", ("pkg-config", "--modversion", "opencv4"), "libopencv-dev"),
)
PROGRAMS = (
    ("git", "the commit in reports", "apt-get install git"),
    ("sbatch", "submitting to SLURM", "apt-get install slurm-wlm munge, or log in to a cluster's head node"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument(
        "--build-engine", action="store_true", help="compile now what DeepSpeed compiles at its first use on a CPU"
    )


def run(arguments: argparse.Namespace) -> Answer:
    """Check the machine; the exit code is 1 if something that every run needs is missing."""
    if arguments.build_engine:
        from dist_prune.distributed.environment import build_engine

        return f"built {build_engine()}", {"built": True}, 0
    findings = run_checks()
    return as_text(findings), findings, int(any(item["state"] == "missing" and item["needed"] for item in findings))


def run_checks() -> list[dict[str, Any]]:
    """Check packages, programs, devices, FFCV, data and SLURM.

    Returns:
        A mapping per item: ``name``, ``state`` (ok, missing or note), ``detail``, ``mend`` (the command that repairs
        it, or an empty text) and ``needed`` (by every run).
    """
    findings = [_package(*item) for item in PACKAGES]
    findings += [_program(*item) for item in PROGRAMS]
    if all(item["state"] == "ok" for item in findings if item["name"] in ("torch", "torchvision")):
        findings.append(_torch())
    return [*findings, *_wheels(findings), *_ffcv(), _data(), *_slurm()]


def _wheels(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How to bring missing packages to a machine that reaches no package index."""
    packages = {package[0] for package in PACKAGES}
    missing = [item["name"] for item in findings if item["state"] == "missing" and item["name"] in packages]
    if not missing:
        return []
    python, machine = ".".join(platform.python_version_tuple()[:2]), platform.machine()
    fetched, made = ([name for name in missing if (name in NO_WHEELS) == own] for own in (False, True))
    download = (
        f"pip download --no-deps --only-binary=:all: --python-version {python} --platform manylinux_2_28_{machine} "
        f"--platform manylinux2014_{machine} -c constraints.txt -d wheels {' '.join(fetched)} (and their dependencies)"
    )
    build = (
        f"pip wheel --no-deps --no-build-isolation -c constraints.txt -w wheels {' '.join(made)} (needs torch there)"
    )
    steps = [text for text, names in ((download, fetched), (build, made)) if names]
    fetch = (
        f"on a machine with a network: {'; '.join(steps)}; here: "
        "python -m pip install --no-deps --no-index wheels/*.whl"
    )
    return [_line(OFFLINE, "note", "wheels can be copied from another machine", fetch)]


def _line(name: str, state: str, detail: str, mend: str = "", needed: bool = False) -> dict[str, Any]:
    return {"name": name, "state": state, "detail": detail, "mend": mend, "needed": needed}


def _package(name: str, needed: bool, purpose: str, mend: str) -> dict[str, Any]:
    try:
        return _line(name, "ok", version(name), needed=needed)
    except PackageNotFoundError:
        return _line(name, "missing", f"needed for {purpose}", mend, needed)


def _program(name: str, purpose: str, mend: str) -> dict[str, Any]:
    path = shutil.which(name)
    return _line(name, "ok", path) if path else _line(name, "missing", f"needed for {purpose}", mend)


def _torch() -> dict[str, Any]:
    try:
        import torch
        import torchvision  # noqa: F401 - an operator of a mismatched pair is missing at this import
    except (ImportError, RuntimeError) as error:
        mend = "pip install -c constraints.txt torch torchvision"
        return _line("torch with torchvision", "missing", f"they do not fit together: {error}", mend, True)
    gpus = torch.cuda.device_count()
    detail = ", ".join(torch.cuda.get_device_name(i) for i in range(gpus)) or "no GPU: runs use the CPU (gloo)"
    return _line("devices", "ok" if gpus else "note", detail)


def _ffcv() -> list[dict[str, Any]]:
    """FFCV, really imported; if that fails, also each piece that its build needs."""
    try:
        importlib.import_module("ffcv")  # libraries that it was built against may be gone
    except Exception as error:
        mend = "make ffcv (or: pip install -c constraints.txt -e '.[ffcv]')"
        detail = f"needed for data.backend=ffcv and dist-prune make-ffcv: {type(error).__name__}: {error}"
        return [_line("ffcv", "missing", detail, mend), *(_piece(*item) for item in FFCV_PIECES)]
    return [_line("ffcv", "ok", version("ffcv"))]


def _piece(name: str, command: tuple[str, ...], package: str) -> dict[str, Any]:
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return _line(f"ffcv: {name}", "ok", output.split("\n")[0])
    except (OSError, subprocess.CalledProcessError):
        return _line(f"ffcv: {name}", "missing", "needed to build ffcv", f"apt-get install {package}")


def _data() -> dict[str, Any]:
    folder = os.environ.get("DIST_PRUNE_DATA")
    if not folder:
        return _line("DIST_PRUNE_DATA", "note", "not set: recipes that name ${DIST_PRUNE_DATA} need it", "export it")
    if not Path(folder).is_dir():
        return _line("DIST_PRUNE_DATA", "missing", f"{folder} is no folder", "export DIST_PRUNE_DATA=FOLDER")
    return _line("DIST_PRUNE_DATA", "ok", folder)


def _slurm() -> list[dict[str, Any]]:
    """The needs of jobs of several nodes, besides sbatch; nothing if there is no SLURM."""
    if shutil.which("sbatch") is None:
        return []
    others = [name for name in ("srun", "scontrol", "squeue", "sinfo") if shutil.which(name) is None]
    if others:
        return [_line("SLURM programs", "missing", f"{', '.join(others)}", "apt-get install slurm-client")]
    try:
        command = ["sinfo", "-h", "-o", "%R: %D node(s), gpus %G, at most %l"]
        sinfo = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        answer, complaint = sinfo.stdout.strip(), sinfo.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        answer, complaint = "", str(error)
    if not answer:
        mend = "check that munged and slurmctld run and that SLURM_CONF, if set, names their configuration"
        detail = f"it does not answer: {' '.join(complaint.split())[-200:] or 'no partition'}"
        return [_line("SLURM controller", "missing", detail, mend)]
    partitions = "; ".join(answer.splitlines())
    findings = [_line("SLURM partitions", "ok", partitions)]
    if "gpu:" not in partitions:
        findings.append(_line("SLURM GPUs", "note", "no partition declares any", "dist-prune launch --slurm --gpus 0"))
    return [*findings, _shared_runs(), *_interfaces()]


def _shared_runs() -> dict[str, Any]:
    """Whether the runs' folder is on a file system that all nodes see."""
    folder = Path(os.environ.get("DIST_PRUNE_RUNS", ".")).resolve()
    file_system, longest = "unknown", -1
    with open("/proc/mounts") as file:
        for line in file:
            _, point, name, *_ = line.split()
            if folder.is_relative_to(point) and len(point) >= longest:
                file_system, longest = name, len(point)
    if file_system.startswith(SHARED_SYSTEMS):
        return _line("runs on all nodes", "ok", f"{folder} is on {file_system}")
    detail = f"{folder} is on {file_system}, which other nodes may not see"
    return _line("runs on all nodes", "note", detail, "export DIST_PRUNE_RUNS=FOLDER on a shared file system")


def _interfaces() -> list[dict[str, Any]]:
    """The network interfaces, if there are several: ranks of several nodes meet through one of them."""
    names = sorted(name for _, name in socket.if_nameindex() if name != "lo")
    if len(names) < 2:
        return []
    mend = "if ranks do not find one another: export DIST_PRUNE_INTERFACE=NAME before sbatch"
    return [_line("network interfaces", "note", ", ".join(names), mend)]


def as_text(findings: list[dict[str, Any]]) -> str:
    """The findings for a terminal."""
    width = max(len(item["name"]) for item in findings)
    lines = []
    for item in findings:
        lines.append(f"{item['state']:8} {item['name']:{width}}  {item['detail']}")
        if item["mend"]:
            lines.append(f"{'':8} {'':{width}}  fix: {item['mend']}")
    return "\n".join(lines)
