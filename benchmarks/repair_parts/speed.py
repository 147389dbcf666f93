"""Seconds and memory of a repair on one rank and on two."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import dist_prune as dp
from benchmarks.repair_parts import subjects
from dist_prune.pruning.repair.cost import repair_cost
from dist_prune.pruning.repair.repaired_layers import repaired_layers

FILE = "speed.json"
ROOT = Path(__file__).resolve().parents[2]


def one(folder: Path, case: str, share: float, count: int, method: Any) -> None:
    """Repair once, on all ranks of this launch; the first one writes what each of them took."""
    torch.distributed.init_process_group("gloo")
    network = subjects.parse(case)[0]
    subject = subjects.subject(network, folder, 10)
    images = subject.first(count)
    scores = dp.score(subject.model, subject.graph, "l1")
    plan = dp.select(scores, subject.graph, target={"macs": share}, seed=subjects.SEED, **subjects.selection(case))
    small = dp.prune(subject.model, plan)
    layers, _ = repaired_layers(small, subject.graph, plan)
    cost = repair_cost(subject.graph, plan.counts, {layer.name for layer in layers})
    dp.repair(subject.model, small, plan, [images], method="norms", images=16)  # connects the ranks
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    repaired = dp.repair(subject.model, small, plan, [images], method=method)
    facts: dict[str, Any] = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    facts |= {"rss_mb": before / 1e3, "rss_after_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}
    facts |= {"cost": cost.text(count), "sum": float(sum(t.double().sum() for t in repaired.state_dict().values()))}
    rank = os.environ.get("RANK", "0")
    (folder / f"{FILE}.{rank}").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


def both(folder: Path, case: str, share: float, count: int, method: str) -> str:
    """One rank and two, one after another, one thread each; the wall time of two against one."""
    lines, walls = [], {}
    for world in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--standalone"]
        command += [str(ROOT / "benchmarks/repair.py"), str(folder), "--speed", "rank"]
        command += ["--cases", f"{case}:{share:g}", "--images", str(count), "--repairs", method]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        facts = [json.loads((folder / f"{FILE}.{rank}").read_text()) for rank in range(world)]
        walls[world] = max(fact["seconds"] for fact in facts)
        shown = ", ".join(
            f"rank {rank}: {fact['cpu_seconds']:.1f} s of the processor, {fact['rss_mb']:.0f} -> "
            f"{fact['rss_after_mb']:.0f} MB"
            for rank, fact in enumerate(facts)
        )
        lines.append(f"{world} rank(s): {walls[world]:.1f} s; {shown}; sum of weights {facts[0]['sum']!r}")
    return "\n".join([facts[0]["cost"], *lines, f"speedup {walls[1] / walls[2]:.2f}"])
