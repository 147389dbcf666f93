"""How much of the machine's processor this process may use: affinity, a container's quota, what the user asked for."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from dist_prune.fileio import read_text

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def cores(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """CPU cores this process may use: those of its affinity, and no more than its container's quota pays for.

    Args:
        cgroups: where control groups are mounted.
        own: the file that names this process's control groups.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    paid = quota(cgroups, own)
    # a thread more than the quota is stopped for a part of every period: times would scatter
    return bound if paid is None else max(1, min(bound, int(paid)))


def threads(environment: Mapping[str, str] | None = None, cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """CPU threads for work of this process: its cores, or fewer where OMP_NUM_THREADS says so."""
    environment = os.environ if environment is None else environment
    asked = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is one number per nested level
    allowed = cores(cgroups, own)
    return min(allowed, int(asked)) if asked.isdigit() and int(asked) else allowed


def quota(cgroups: Path = CGROUPS, own: Path = OWN) -> float | None:
    """CPUs' worth of time that the control groups of this process grant it, or None where they grant all.

    Version 2 writes ``cpu.max``, version 1 ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``; the smallest grant on the
    way from this process's group up to the root counts. Inside a container the root is the container's own group.
    """
    lines = read_text(own).splitlines()
    found = []
    for line in lines or ["0::/"]:
        names, _, path = line.partition(":")[2].partition(":")
        if not names:
            found += [_version_2(place) for mount in (cgroups, cgroups / "unified") for place in _up(mount, path)]
        elif "cpu" in names.split(","):
            mounts = {cgroups / name for name in (names, "cpu", "cpu,cpuacct", "cpuacct,cpu")}
            found += [_version_1(place) for mount in sorted(mounts) for place in _up(mount, path)]
    return min((grant for grant in found if grant is not None), default=None)


def _up(mount: Path, path: str) -> Iterator[Path]:
    """A group's folder and those above it, the mount last; a path that leaves the mount is the host's."""
    parts = [] if ".." in path.split("/") else list(PurePosixPath(path.lstrip("/")).parts)
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _version_2(place: Path) -> float | None:
    granted, _, period = read_text(place / "cpu.max").strip().partition(" ")
    return _ratio(granted, period)


def _version_1(place: Path) -> float | None:
    return _ratio(read_text(place / "cpu.cfs_quota_us").strip(), read_text(place / "cpu.cfs_period_us").strip())


def _ratio(granted: str, period: str) -> float | None:
    """Microseconds of each period; "max" and -1 are no limit."""
    return int(granted) / int(period) if granted.isdigit() and period.isdigit() and int(period) else None
