"""The number of CPU cores and threads of this process: affinity, the container's quota, OMP_NUM_THREADS."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from dist_prune.fileio import read_text

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def cores(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """The number of CPU cores of this process: those of its affinity, limited by its container's quota; at least 1.

    Args:
        cgroups: the folder where control groups are mounted.
        own: the file that names this process's control groups.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    limit = quota(cgroups, own)
    # a thread beyond the quota is stopped for a part of every period: times would scatter
    return affinity if limit is None else max(1, min(affinity, int(limit)))


def threads(environment: Mapping[str, str] | None = None, cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """The number of CPU threads for computations: the cores of this process, or fewer if OMP_NUM_THREADS says so.

    Args:
        environment: the environment's variables (default: those of this process).
        cgroups: see ``cores``.
        own: see ``cores``.
    """
    environment = os.environ if environment is None else environment
    wanted = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is one number per nested level
    allowed = cores(cgroups, own)
    return min(allowed, int(wanted)) if wanted.isdigit() and int(wanted) else allowed


def quota(cgroups: Path = CGROUPS, own: Path = OWN) -> float | None:
    """The CPU quota of this process's control groups in cores, or None without a quota.

    Version 2 writes ``cpu.max``, version 1 ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``. The smallest quota counts,
    from this process's group up to the root. Inside a container the root is the container's own group.

    Args:
        cgroups: see ``cores``.
        own: see ``cores``.
    """
    lines = read_text(own).splitlines()
    quotas = []
    for line in lines or ["0::/"]:
        names, _, path = line.partition(":")[2].partition(":")
        if not names:
            quotas += [
                _quota_v2(folder) for mount in (cgroups, cgroups / "unified") for folder in _ancestors(mount, path)
            ]
        elif "cpu" in names.split(","):
            mounts = {cgroups / name for name in (names, "cpu", "cpu,cpuacct", "cpuacct,cpu")}
            quotas += [_quota_v1(folder) for mount in sorted(mounts) for folder in _ancestors(mount, path)]
    return min((value for value in quotas if value is not None), default=None)


def _ancestors(mount: Path, path: str) -> Iterator[Path]:
    """A group's folder and the folders above it, the mount last; a path that leaves the mount belongs to the host."""
    parts = [] if ".." in path.split("/") else list(PurePosixPath(path.lstrip("/")).parts)
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _quota_v2(folder: Path) -> float | None:
    granted, _, period = read_text(folder / "cpu.max").strip().partition(" ")
    return _ratio(granted, period)


def _quota_v1(folder: Path) -> float | None:
    return _ratio(read_text(folder / "cpu.cfs_quota_us").strip(), read_text(folder / "cpu.cfs_period_us").strip())


def _ratio(granted: str, period: str) -> float | None:
    """The quota by the period, both in microseconds; None for "max" and -1, which are no limit."""
    return int(granted) / int(period) if granted.isdigit() and period.isdigit() and int(period) else None
