"""Packages installed for tests: those of tests/plugins by pip, and dist-infos written by hand for the wrong ones."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugins"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q")
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir")


def install(folder: Path) -> Path:
    """pip installs the four packages of third parties into a folder, for a PYTHONPATH."""
    packages = sorted(str(place) for place in PLUGINS.iterdir() if (place / "pyproject.toml").is_file())
    done = subprocess.run(
        [*PIP, "install", *OFFLINE, "--target", str(folder), *packages], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def by_hand(folder: Path, distribution: str, kind: str, name: str, value: str, source: str | None = None) -> None:
    """A package of one module, with one entry point, as pip would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None:
        (folder / f"{value.partition(':')[0]}.py").write_text(source)
    info = folder / f"{distribution}-0.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.9\n")
    (info / "entry_points.txt").write_text(f"[dist_prune.{kind}s]\n{name} = {value}\n")
