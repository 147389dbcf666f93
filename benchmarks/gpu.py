"""Everything that needs a real GPU, in order of worth, in one command.

    python benchmarks/gpu.py [--minutes 25] [--only tests,scoring] [--json gpu.json] [--device cuda|cpu]

Needs nothing outside the checkout: images are synthetic where speed is measured. Figures are written to the JSON file
as they come; stopped and started again with the same file, finished parts are skipped. Each part has a share of the
minutes. The table printed last is for RESULTS.md: card, driver, commit. ``--device cpu`` proves the script where there
is no GPU, on next to no images.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.pipeline.git import commit_of

# part -> share of the minutes
PARTS = {
    "tests": 0.15, "scoring": 0.25, "training": 0.2, "deployment": 0.25, "loading": 0.05, "engines": 0.05,
    "solvers": 0.05,
}  # fmt: skip
COLUMNS = ("what", "beside", "images_per_s", "bare_images_per_s", "ratio", "bound", "peak_mb", "more")


def card() -> dict[str, Any]:
    """What the figures belong to."""
    facts = describe_environment(DistributedEnvironment.single_process())
    driver = None
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.split("\n")[0] or None
    except (OSError, subprocess.SubprocessError):
        pass
    commit = commit_of(ROOT / "README.md") or os.environ.get("DIST_PRUNE_COMMIT")
    return {
        "gpu": facts["gpu"], "driver": driver, "cuda": torch.version.cuda, "torch": facts["packages"]["torch"],
        "cores": facts["cores"], "commit": commit,
    }  # fmt: skip


def markdown(body: dict[str, Any]) -> str:
    """The table for RESULTS.md."""
    lines = [", ".join(f"{key} {value}" for key, value in body["machine"].items()), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for part in body["parts"].values():
        for row in part["rows"]:
            rest = {k: v for k, v in row.items() if k not in COLUMNS}
            row = {**row, "more": ", ".join(f"{key} {value}" for key, value in rest.items())}
            lines.append("| " + " | ".join("" if row.get(c) is None else str(row[c]) for c in COLUMNS) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, commas between")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    asked = [name for name in PARTS if name in given.only.split(",")]
    if len(asked) != len(given.only.split(",")):
        parser.error(f"--only: {', '.join(PARTS)}, with commas between; got {given.only!r}")
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this machine has no GPU; --device cpu proves the script without one")
    body = json.loads(given.json.read_text()) if given.json.is_file() else {"parts": {}}
    body["machine"] = card()
    total = sum(PARTS[name] for name in asked)
    for name in asked:
        if body["parts"].get(name, {}).get("finished"):
            print(f"{name}: measured before, skipped")
            continue
        part = body["parts"][name] = {"rows": [], "finished": False}
        start = time.perf_counter()
        module = importlib.import_module(f"benchmarks.gpu_parts.{name}")
        try:
            for row in module.rows(torch.device(given.device), 60 * given.minutes * PARTS[name] / total):
                part["rows"].append(row)
                print(json.dumps(row), flush=True)
                _write(given.json, body)
            part["finished"] = True
        except Exception as error:  # the other parts are still worth measuring
            part["rows"].append({"what": name, "failed": f"{type(error).__name__}: {error}"[:500]})
            print(json.dumps(part["rows"][-1]), flush=True)
        part["seconds"] = round(time.perf_counter() - start)
        _write(given.json, body)
    print("\n" + markdown(body))


def _write(file: Path, body: dict[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(body, indent=1))
    temporary.replace(file)


if __name__ == "__main__":
    main()
