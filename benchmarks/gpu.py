"""Everything that needs a real GPU, in order of worth, in one command.

    python benchmarks/gpu.py [--minutes 25] [--only tests,scoring] [--json gpu.json] [--device cuda|cpu] [--again]

Needs nothing outside the checkout: images are synthetic where speed is measured. What the machine lacks is printed
first. Each part has a share of the minutes. Figures are written to the JSON file as they come; stopped and started
again with the same file, it goes on behind the last figure (``--again``: what failed is measured again). The table
printed last is for RESULTS.md: card, driver, commit. ``--device cpu`` proves the script where there is no GPU, on
next to no images.
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

DOCTOR = "python -m dist_prune.cli.main doctor says how to bring it"
try:
    import torch

    from dist_prune.cli import doctor
    from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
    from dist_prune.pipeline.git import commit_of
except ImportError as error:
    sys.exit(f"this machine lacks a package: {error}; {DOCTOR}")

# part -> share of the minutes
PARTS = {
    "tests": 0.15, "scoring": 0.25, "training": 0.2, "deployment": 0.25, "loading": 0.05, "engines": 0.05,
    "solvers": 0.05,
}  # fmt: skip
NOT_TOLD = ("output", "failures", "commit")  # in the file alone
COLUMNS = ("what", "beside", "images_per_s", "bare_images_per_s", "ratio", "bound", "peak_mb", "more")


def card(device: str) -> dict[str, Any]:
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
        "device": device, "gpu": facts["gpu"], "driver": driver, "cuda": torch.version.cuda,
        "torch": facts["packages"]["torch"], "cores": facts["cores"], "commit": commit,
    }  # fmt: skip


def missing() -> list[str]:
    """What this machine lacks of what the parts use, and how to bring it."""
    names = {*(package[0] for package in doctor.PACKAGES), "ffcv"}
    found = [item for item in doctor.run_checks() if item["state"] != "ok"]
    lines = [f"missing: {item['name']}, {item['detail']}; {item['mend']}" for item in found if item["name"] in names]
    return lines + [f"{item['name']}: {item['mend']}" for item in found if lines and item["name"] == doctor.OFFLINE]


def markdown(body: dict[str, Any]) -> str:
    """The table for RESULTS.md."""
    lines = [", ".join(f"{key} {value}" for key, value in body["machine"].items()), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for part in body["parts"].values():
        for row in part["rows"]:
            rest = {k: v for k, v in row.items() if k not in (*COLUMNS, *NOT_TOLD)}
            commit = row.get("commit")
            rest |= {"commit": commit} if commit != body["machine"]["commit"] else {}
            row = {**row, "more": ", ".join(f"{k} {v}" for k, v in rest.items() if v is not None)}
            lines.append(
                "| " + " | ".join("" if row.get(c) is None else " ".join(str(row[c]).split()) for c in COLUMNS) + " |"
            )
    return "\n".join(lines)


def measure(name: str, given: argparse.Namespace, body: dict[str, Any], seconds: float) -> None:
    """The figures of one part that are not there yet, within its time."""
    part = body["parts"].setdefault(name, {"rows": [], "finished": False, "seconds": 0})
    kept = [row for row in part["rows"] if row["what"] != name]  # the part's own failure
    part["rows"] = [row for row in kept if not (given.again and {"failed", "missing"} & row.keys())]
    part["finished"] &= len(part["rows"]) == len(kept)
    if part["finished"]:
        print(f"{name}: measured before, skipped")
        return
    start = time.perf_counter()
    try:
        module = importlib.import_module(f"benchmarks.gpu_parts.{name}")
        done = frozenset(row["what"] for row in part["rows"])
        for row in module.rows(torch.device(given.device), seconds, done):
            part["rows"].append({**row, "commit": body["machine"]["commit"]})
            print(json.dumps(row), flush=True)
            _write(given.json, body)
            if time.perf_counter() - start > seconds:
                print(f"{name}: its {seconds:.0f} s are over; the same command goes on from here", flush=True)
                break
        else:
            part["finished"] = True
    except ImportError as error:
        part["rows"].append({"what": name, "missing": f"{error}; {DOCTOR}"})
        print(json.dumps(part["rows"][-1]), flush=True)
    except Exception as error:  # the other parts are still worth measuring
        part["rows"].append({"what": name, "failed": f"{type(error).__name__}: {error}"[:500]})
        print(json.dumps(part["rows"][-1]), flush=True)
    part["seconds"] += round(time.perf_counter() - start)
    _write(given.json, body)


def earlier(file: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """What the file holds; figures of two machines do not go into one."""
    if not file.is_file():
        return {"parts": {}, "machine": machine}
    body = json.loads(file.read_text())
    for key in ("device", "gpu"):
        if body["machine"].get(key) != machine[key]:
            sys.exit(
                f"{file} holds figures of {key} {body['machine'].get(key)}, this is {machine[key]}: another --json"
            )
    return body | {"machine": machine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, commas between")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--again", action="store_true", help="measure again what failed or was missing")
    given = parser.parse_args()
    asked = [name for name in PARTS if name in given.only.split(",")]
    if len(asked) != len(given.only.split(",")):
        parser.error(f"--only: {', '.join(PARTS)}, with commas between; got {given.only!r}")
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this machine has no GPU; --device cpu proves the script without one")
    body = earlier(given.json, card(given.device))
    for line in missing():
        print(line, flush=True)
    end = time.monotonic() + 60 * given.minutes
    for number, name in enumerate(asked):
        # what an earlier part left of its time is the later ones'
        left = sum(PARTS[later] for later in asked[number:] if not body["parts"].get(later, {}).get("finished"))
        measure(name, given, body, max((end - time.monotonic()) * PARTS[name] / (left or 1), 0))
    print("\n" + markdown(body))


def _write(file: Path, body: dict[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(body, indent=1))
    temporary.replace(file)


if __name__ == "__main__":
    main()
