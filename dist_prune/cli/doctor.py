"""What is installed, what is missing, and the command that mends it."""

import importlib
import os
import platform
import shutil
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    # distribution, needed by every run, what it is for, what mends it
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
SHARED_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "gfs2", "ocfs2", "wekafs", "panfs", "9p")
FFCV_PIECES = (
    # what, a command that prints its version where it is there, Debian's package
    ("g++", ("g++", "--version"), "g++"),
    ("pkg-config", ("pkg-config", "--version"), "pkg-config"),
    ("turbojpeg", ("pkg-config", "--modversion", "libturbojpeg"), "libturbojpeg0-dev"),
    ("opencv", ("pkg-config", "--modversion", "opencv4"), "libopencv-dev"),
)
PROGRAMS = (
    ("git", "the commit in reports", "apt-get install git"),
    ("sbatch", "submitting to SLURM", "apt-get install slurm-wlm munge, or log in to a cluster's head node"),
)


def run_checks() -> list[dict[str, Any]]:
    """A line per thing: name, state (ok, missing, note), detail, mend, needed."""
    found = [_package(*item) for item in PACKAGES]
    found += [_program(*item) for item in PROGRAMS]
    if all(item["state"] == "ok" for item in found if item["name"] in ("torch", "torchvision")):
        found.append(_torch())
    return [*found, *_wheels(found), *_ffcv(), _data(), *_slurm()]


def _wheels(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How to bring what is missing to a machine that reaches no package index."""
    missing = [
        item["name"] for item in found if item["state"] == "missing" and item["name"] in {p[0] for p in PACKAGES}
    ]
    if not missing:
        return []
    python, machine = ".".join(platform.python_version_tuple()[:2]), platform.machine()
    fetch = (
        f"where there is a network: pip download --no-deps --only-binary=:all: --python-version {python} --platform "
        f"manylinux_2_28_{machine} --platform manylinux2014_{machine} -c constraints.txt -d wheels {' '.join(missing)} "
        "(and what they need); here: python -m pip install --no-deps --no-index wheels/*.whl"
    )
    return [_line("without a network", "note", "wheels can be carried", fetch)]


def _line(name: str, state: str, detail: str, mend: str = "", needed: bool = False) -> dict[str, Any]:
    return {"name": name, "state": state, "detail": detail, "mend": mend, "needed": needed}


def _package(name: str, needed: bool, purpose: str, mend: str) -> dict[str, Any]:
    try:
        return _line(name, "ok", version(name), needed=needed)
    except PackageNotFoundError:
        return _line(name, "missing", f"needed for {purpose}", mend, needed)


def _program(name: str, purpose: str, mend: str) -> dict[str, Any]:
    place = shutil.which(name)
    return _line(name, "ok", place) if place else _line(name, "missing", f"needed for {purpose}", mend)


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
    """FFCV, imported for real; where that fails, each piece that its build needs."""
    try:
        importlib.import_module("ffcv")  # libraries that it was built against may be gone
    except Exception as error:
        mend = "make ffcv (or: pip install -c constraints.txt -e '.[ffcv]')"
        line = _line(
            "ffcv", "missing", f"data.backend=ffcv, dist-prune make-ffcv: {type(error).__name__}: {error}", mend
        )
        return [line, *(_piece(*item) for item in FFCV_PIECES)]
    return [_line("ffcv", "ok", version("ffcv"))]


def _piece(name: str, command: tuple[str, ...], package: str) -> dict[str, Any]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
        return _line(f"ffcv: {name}", "ok", done)
    except (OSError, subprocess.CalledProcessError):
        return _line(f"ffcv: {name}", "missing", "needed to build ffcv", f"apt-get install {package}")


def _data() -> dict[str, Any]:
    place = os.environ.get("DIST_PRUNE_DATA")
    if not place:
        return _line("DIST_PRUNE_DATA", "note", "not set: recipes that name ${DIST_PRUNE_DATA} need it", "export it")
    if not Path(place).is_dir():
        return _line("DIST_PRUNE_DATA", "missing", f"{place} is no folder", "export DIST_PRUNE_DATA=FOLDER")
    return _line("DIST_PRUNE_DATA", "ok", place)


def _slurm() -> list[dict[str, Any]]:
    """What jobs of several nodes need beside sbatch; nothing where there is no SLURM."""
    if shutil.which("sbatch") is None:
        return []
    others = [name for name in ("srun", "scontrol", "squeue", "sinfo") if shutil.which(name) is None]
    if others:
        return [_line("SLURM programs", "missing", f"{', '.join(others)}", "apt-get install slurm-client")]
    try:
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%R: %D node(s), gpus %G, at most %l"], capture_output=True, text=True, timeout=20,
            check=False,
        )  # fmt: skip
        answer, said = done.stdout.strip(), done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        answer, said = "", str(error)
    if not answer:
        mend = "check that munged and slurmctld run and that SLURM_CONF, if set, names their configuration"
        return [
            _line(
                "SLURM controller",
                "missing",
                f"it does not answer: {' '.join(said.split())[-200:] or 'no partition'}",
                mend,
            )
        ]
    partitions = "; ".join(answer.splitlines())
    found = [_line("SLURM partitions", "ok", partitions)]
    if "gpu:" not in partitions:
        found.append(_line("SLURM GPUs", "note", "no partition declares any", "dist-prune launch --slurm --gpus 0"))
    return [*found, _shared_runs(), *_interfaces()]


def _shared_runs() -> dict[str, Any]:
    """Whether the folder of the runs looks like one that all nodes see."""
    place = Path(os.environ.get("DIST_PRUNE_RUNS", ".")).resolve()
    kind, best = "unknown", -1
    with open("/proc/mounts") as file:
        for line in file:
            _, point, name, *_ = line.split()
            if place.is_relative_to(point) and len(point) >= best:
                kind, best = name, len(point)
    if kind.startswith(SHARED_SYSTEMS):
        return _line("runs on all nodes", "ok", f"{place} is on {kind}")
    detail = f"{place} is on {kind}, which other nodes may not see"
    return _line("runs on all nodes", "note", detail, "export DIST_PRUNE_RUNS=FOLDER on a shared file system")


def _interfaces() -> list[dict[str, Any]]:
    """Ranks of several nodes meet through one network interface; with many, the choice may have to be made."""
    names = sorted(name for _, name in socket.if_nameindex() if name != "lo")
    if len(names) < 2:
        return []
    mend = "where ranks do not find one another: export DIST_PRUNE_INTERFACE=NAME before sbatch"
    return [_line("network interfaces", "note", ", ".join(names), mend)]


def as_text(findings: list[dict[str, Any]]) -> str:
    """The findings for a terminal."""
    width = max(len(item["name"]) for item in findings)
    lines = []
    for item in findings:
        lines.append(f"{item['state']:8} {item['name']:{width}}  {item['detail']}")
        if item["mend"]:
            lines.append(f"{'':8} {'':{width}}  mend: {item['mend']}")
    return "\n".join(lines)
