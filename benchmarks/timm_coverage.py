"""Which of timm's networks can be pruned for real: scored (l1), cut to 0.7 of the MACs, run, trained a step, saved,
loaded and compared.

    python benchmarks/timm_coverage.py --out FOLDER [--per-family 1] [--only GLOB ...] [--seconds 120]
        [--streams] [--units whole]
    python benchmarks/timm_coverage.py --out FOLDER --write docs/coverage.md          the table of what is there

A family is one entry of timm.list_modules() (the file of timm that defines the networks), tried by its smallest
network. Each network has a process of its own and a time limit. Weights are random; FOLDER/results.jsonl gets a line
as soon as one is done, and the same command goes on where it stopped. One thread.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

os.environ["OMP_NUM_THREADS"] = "1"

import timm
import torch

from dist_prune import models
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.errors import PruneError
from dist_prune.methods.l1 import L1
from dist_prune.pipeline.git import commit_of
from dist_prune.pruning.graph.groups import Units
from dist_prune.pruning.graph.head_groups import fold_units
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection import cost
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.verified_trace import trace_groups

MACS, TOLERANCE = 0.7, 0.02


def families(seconds: float = 60) -> dict[str, list[str]]:
    """Module of timm -> its networks, smallest (parameters) first. Built on the meta device, which costs no memory."""
    out: dict[str, list[str]] = {}
    for family in timm.list_modules():
        sizes = {}
        names = [name for name in timm.list_models(module=family) if timm.is_model(name)]
        names.sort(key=lambda name: "test_" not in name)  # timm's own tiny ones first
        start = time.monotonic()
        for name in names:
            if time.monotonic() - start > seconds and sizes:  # large families: the first names suffice
                break
            try:
                with torch.device("meta"):
                    sizes[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
            except Exception:  # some cannot be made on the meta device: tried last
                sizes[name] = 10**12
        out[family] = sorted(sizes, key=lambda name: (sizes[name], name))
    return {family: names for family, names in out.items() if names}


def attempt(name: str, streams: bool = False, units: Units = "earlier") -> dict[str, Any]:
    """Everything for one network; ``stage`` says how far it came, ``reason`` why no further."""
    torch.manual_seed(0)
    found: dict[str, Any] = {"stage": "create"}

    class Weights:
        """All that l1 asks of a scoring context."""

        def __init__(self, model: torch.nn.Module, graph: Any):
            self.model, self.hook_points = model, graph.hook_points

        def weight(self, point: Any) -> torch.Tensor:
            return fold_units(point.at_weight, self.model.get_submodule(point.layer).weight.detach())  # type: ignore[arg-type]

    try:
        model = models.create(name, 10, 3).eval()
        side = models.image_config(model, 3)["input_size"][-1]
        found |= {"side": side, "params": sum(p.numel() for p in model.parameters()), "stage": "trace"}
        example = torch.randn(2, 3, side, side)
        channels = trace_groups(model, example[:1], streams=streams, units=units)
        found |= {"free": len(channels.free), "groups": len(channels.groups), "share": free_share(channels)}
        found["stage"] = "select"
        if not channels.free:
            raise ValueError(f"no group is free. {protections(channels)}")
        method = L1(L1.Options())
        scores = method.score(Weights(model, channels))  # type: ignore[arg-type]
        request = SelectionRequest(target=("macs", MACS), scope="local")
        try:
            method.check(channels, request)
        except PruneError as error:
            raise ValueError(f"{str(error).split('. Raise the target')[0]}. {protections(channels)}") from error
        plan = method.select(scores, channels, request)
        left = cost.macs(channels, plan.counts) / cost.macs(channels)
        found |= {"macs_left": left, "stage": "cut"}
        surgeon.apply_plan(model, channels, plan)
        params = sum(p.numel() for p in model.parameters())
        found |= {"params_left": params / found["params"], "stage": "forward"}
        if params != cost.params(channels, plan.counts):
            raise ValueError(f"{params} parameters, arithmetic says {cost.params(channels, plan.counts)}")
        with torch.no_grad():
            before = model(example)
        found["stage"] = "backward"
        model.train()
        model(example).square().mean().backward()
        model.eval()
        found["stage"] = "save"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            tensor_files.save_tensors(file, model.state_dict())
            found["stage"] = "load"
            shell = models.create(name, 10, 3)
            again = rebuild(shell, Plan.from_json(plan.to_json()), tensor_files.read_tensors(file)[0]).eval()
        found["stage"] = "compare"
        with torch.no_grad():
            model.load_state_dict(again.state_dict())  # batch norms moved in training mode
            if not torch.equal(again(example), model(example)) or before.shape != (2, 10):
                raise ValueError("the loaded network answers otherwise than the saved one")
        if left > MACS + TOLERANCE:
            raise ValueError(f"{left:.3f} of the MACs are left")
        found["stage"] = "done"
    except Exception as error:
        lines = str(error).splitlines()
        found["reason"] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:600]
        found["trace"] = traceback.format_exc()[-1500:]
    return found


def free_share(channels: Any) -> float:
    """Share of the MACs in layers that a free group narrows."""
    narrowed = {layer for group in channels.free for layer in group.layers}
    of = {name: cost.macs(replace(channels, layers={name: layer})) for name, layer in channels.layers.items()}
    return sum(count for name, count in of.items() if name in narrowed) / sum(of.values())


def protections(channels: Any) -> str:
    """Each reason for which groups are left whole, with one of the layers, the widest first."""
    first: dict[str, str] = {}
    for group in sorted(channels.groups, key=lambda group: -group.width):
        if group.protected:
            first.setdefault(group.protected.split(" (")[0].partition(",")[0], f"{group.name}: {group.protected}")
    return "Left whole, for example: " + "; ".join(list(first.values())[:3])


def tried(name: str, seconds: float, streams: bool = False, units: Units = "earlier") -> dict[str, Any]:
    """``attempt`` in a process of its own, forked from this one, which has imported everything."""
    start, context = time.monotonic(), multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(attempt(name, streams, units)))
    process.start()
    theirs.close()
    try:
        if mine.poll(seconds):
            found = mine.recv()
        else:
            found = {"stage": "time", "reason": f"not done within {seconds:.0f} s on one thread"}
    except EOFError:
        process.join()
        found = {"stage": "process", "reason": f"the process ended with {process.exitcode}"}
    process.kill()
    process.join()
    asked = [*(["streams"] if streams else []), *([f"units={units}"] if units != "earlier" else [])]
    found |= {"asked": ", ".join(asked), "commit": commit_of(Path(__file__))[:7]}
    return found | {"seconds": round(time.monotonic() - start, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the shares, then a line per network."""
    facts = describe_environment(DistributedEnvironment.single_process())
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["family"], row)
    good = [family for family, row in first.items() if row["stage"] == "done"]
    passed = sum(row["stage"] == "done" for row in rows)
    lines = [
        "# Coverage of timm", "",
        "Generated by `python benchmarks/timm_coverage.py --out FOLDER --write docs/coverage.md`; do not edit.", "",
        f"{len(good)} of {len(first)} families ({len(good) / len(first):.0%}) by their smallest network; "
        f"{passed} of {len(rows)} networks tried ({passed / len(rows):.0%}). Passed means: traced, scored by l1, cut "
        f"to {MACS} of the MACs for real, run, a backward pass, saved, loaded from the file, the same outputs. Random "
        "weights, 10 classes, the network's own image size. A family is an entry of `timm.list_modules()`. The share "
        "of MACs is that of the layers which a free group narrows. Rows that ask for nothing have the default options: "
        "residual streams behind norms and the heads of most families stay whole.", "",
        f"{facts['processor']}, timm {facts['packages']['timm']}, torch {facts['packages']['torch']}, seed 0, commits "
        f"{', '.join(sorted({row['commit'] for row in rows}))}.", "",
        "| family | network | asked for | result | MACs left | parameters left | free groups "
        "| share of MACs in free groups | why not |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: (row["family"], row["network"])):
        share = [f"{row[key]:.2f}" if key in row else "-" for key in ("macs_left", "params_left")]
        groups = f"{row['free']} of {row['groups']}" if "free" in row else "-"
        within = f"{row['share']:.1%}" if "share" in row else "-"
        result = "passed" if row["stage"] == "done" else f"failed at {row['stage']}"
        reason = row.get("reason", "").replace("|", "/")
        lines.append(
            f"| {row['family']} | {row['network']} | {row['asked']} | {result} | {share[0]} | {share[1]} "
            f"| {groups} | {within} | {reason} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-family", type=int, default=1, help="networks per family, smallest first; 0: all")
    parser.add_argument("--only", nargs="*", default=[], help="globs of networks or families")
    parser.add_argument("--seconds", type=float, default=120, help="for each network")
    parser.add_argument("--minutes", type=float, default=1000, help="start none later than this")
    parser.add_argument("--again", action="store_true", help="try those that failed once more")
    parser.add_argument("--streams", action="store_true", help="prune residual streams behind norms over channels too")
    parser.add_argument("--units", choices=get_args(Units), default="earlier", help="which whole units are found")
    parser.add_argument("--write", type=Path, help="the table as Markdown")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    known, file = given.out / "families.json", given.out / "results.jsonl"
    if not known.exists():
        known.write_text(json.dumps(families(), indent=1))
    rows = {row["network"]: row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    start = time.monotonic()
    for family, names in json.loads(known.read_text()).items() if not given.write else ():
        for name in names[: given.per_family or None]:
            wanted = not given.only or any(fnmatchcase(word, glob) for glob in given.only for word in (name, family))
            finished = name in rows and not (given.again and rows[name]["stage"] != "done")
            if not wanted or finished or time.monotonic() - start > 60 * given.minutes:
                continue
            rows[name] = {"family": family, "network": name} | tried(name, given.seconds, given.streams, given.units)
            with file.open("a") as out:
                out.write(json.dumps(rows[name]) + "\n")
            print(family, name, rows[name]["stage"], rows[name].get("reason", ""), flush=True)
    text = table(list(rows.values()))
    if given.write:
        given.write.write_text(text)
    print(text.splitlines()[4])


if __name__ == "__main__":
    main()
