"""Pieces of the study: scoring, surgery, recalibration, finetuning and judging of one method on one network."""

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.which_parts.settings import MOST_IMAGES, SCOPES, SETTINGS, TARGETS, base_of, method_of
from benchmarks.which_parts.subject import Subject, counted
from dist_prune import methods
from dist_prune.config.training import Training
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import describe_environment
from dist_prune.methods.base import TRAINED, Method
from dist_prune.pipeline.git import commit_of
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection import cost as costs
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.scoring.repair import Repairer
from dist_prune.training.bn_recalibration import recalibrate_bn
from dist_prune.training.evaluation import evaluate
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer

SCOPE_OF = {
    "untrained": "local", "global": "global", "repaired": "local", "repaired_global": "global",
    "finetune": "local", "finetune_global": "global",
}  # fmt: skip
RECALIBRATION = 500  # calibration images of the seed
JUDGED = {"resnet20": (2000, 5000)}  # held-out and test images of an untrained network, at most
COSTS = {"macs": costs.macs, "params": costs.params}


class Study:
    """Pieces of the study in one folder."""

    def __init__(self, out: Path, limit: int | None, epochs: int):
        self.out, self.limit, self.epochs = out, limit, epochs
        self.subjects: dict[str, Subject] = {}
        (out / "scores").mkdir(parents=True, exist_ok=True)

    def subject(self, name: str) -> Subject:
        base = base_of(name)
        if base not in self.subjects:
            self.subjects[base] = Subject(base, self.limit)
        return self.subjects[base]

    def file(self, network: str, row: str, part: str, seed: int) -> Path:
        epochs = f"{self.epochs}_epochs" if part.startswith("finetune") else ""
        words = (network, row.replace(", ", "_").replace(" ", "_"), part, epochs, f"seed{seed}")
        return self.out / (".".join(word for word in words if word) + ".json")

    def piece(self, network: str, row: str, part: str, seed: int) -> dict[str, Any]:
        """Measure one piece."""
        start, used = time.perf_counter(), time.process_time()
        body: dict[str, Any] = {"network": network, "method": row, "part": part, "seed": seed}
        if part == "dense":
            found = self.judge(network, self.subject(network).model, "finetune")
        elif part.startswith("finetune"):
            found = {"epochs": self.epochs, **self.finetuned(network, row, seed, SCOPE_OF[part])}
        elif part.startswith("repaired"):
            found = self.repaired(network, row, seed, SCOPE_OF[part])
        else:
            found = self.untrained(network, row, seed, SCOPE_OF[part])
        body |= found
        body["piece"] = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
        about = describe_environment(self.subject(network).machine)
        body["about"] = {
            **{key: about[key] for key in ("processor", "cores", "threads", "python")},
            "torch": about["packages"]["torch"], "commit": commit_of(Path(__file__)),
        }  # fmt: skip
        return body

    def judge(self, network: str, model: nn.Module, part: str) -> dict[str, float]:
        """Top-1 in percent on the images that decide (if there are any) and on those that report."""
        subject, found = self.subject(network), {}
        most = (5000, 10000) if part == "finetune" else JUDGED.get(network, (1000, 2000))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, loader, ids in (
            ("held_out", subject.train, subject.decide[: most[0]]),
            ("test", subject.test, subject.report[: most[1]]),
        ):
            if len(ids):
                judged = evaluate(model, loader, subject.batch, subject.machine.comm, Tracker(False), ids=ids)
                found[name] = judged["top1"]
        return found

    def scores(self, network: str, row: str, seed: int) -> tuple[Method, dict[str, Tensor], dict[str, Any]]:
        """Scores of a row, computed once, with their cost in forward and backward passes of one image."""
        subject, setting = self.subject(network), SETTINGS[row]
        kind = methods.find(method_of(row))
        method = kind(kind.Options.model_validate(dict(setting.options)))
        file = self.out / "scores" / self.file(base_of(network), row, "scores", seed).with_suffix(".safetensors").name
        if not file.exists() or tensor_files.read_tensors(file)[1].get("setting") != repr(setting):
            images = min(setting.images, MOST_IMAGES) if base_of(network) == "mobilenetv2" else setting.images
            ids = subject.calibration(max(images, 1), seed)
            context = DistributedScoringContext(
                subject.model, method.prunable(subject.channels), subject.train, ids, subject.machine, Tracker(False),
                setting.micro, seed,
            )  # fmt: skip
            with counted() as one, torch.no_grad():
                subject.model(next(subject.train.batches([ids[:1]])).images)
            start = time.perf_counter()
            with counted() as found:
                tensors = method.score(context)
            cost = {
                "images": len(ids) if images else 0,
                "forward": found.forward / one.forward, "backward": found.backward / one.forward,
                "cpu_seconds": found.seconds, "seconds": time.perf_counter() - start,
            }  # fmt: skip
            tensor_files.save_tensors(file, tensors, {"cost": cost, "setting": repr(setting)})
        tensors, meta = tensor_files.read_tensors(file)
        return method, tensors, meta["cost"]

    def cut(self, network: str, row: str, seed: int, scope: str) -> tuple[nn.Module, dict[str, float]]:
        """The network after surgery, and the shares of its costs that are left."""
        return self.cut_by_plan(network, row, seed, scope)[:2]

    def cut_by_plan(
        self, network: str, row: str, seed: int, scope: str
    ) -> tuple[nn.Module, dict[str, float], nn.Module, Plan]:
        """The network after surgery, the shares of its costs that are left, what it was cut from, and the plan."""
        subject = self.subject(network)
        method, scores, _ = self.scores(network, row, seed)
        request = SelectionRequest(target=("macs", TARGETS[network]), seed=seed, **SCOPES[scope])
        plan = method.select(scores, method.prepare(method.prunable(subject.channels), (), request), request)
        dense = copy.deepcopy(subject.cuttable)
        if method.trains_weights:
            dense.load_state_dict({n.removeprefix(TRAINED): t for n, t in scores.items() if n.startswith(TRAINED)})
        model = copy.deepcopy(dense)
        surgeon.apply_plan(model, subject.channels, plan)
        left = {name: float(f(subject.channels, plan.counts) / f(subject.channels)) for name, f in COSTS.items()}
        return model.eval(), left, dense.eval(), plan

    def recalibrate(self, network: str, model: nn.Module, seed: int) -> None:
        subject = self.subject(network)
        ids = subject.calibration(RECALIBRATION, seed)
        recalibrate_bn(model, subject.train, ids, 5 * subject.batch, subject.machine.comm)

    def untrained(self, network: str, row: str, seed: int, scope: str) -> dict[str, Any]:
        """Top-1 after surgery and after recalibration."""
        cost = self.scores(network, row, seed)[2]
        model, left = self.cut(network, row, seed, scope)
        surgery = self.judge(network, model, "untrained")
        self.recalibrate(network, model, seed)
        judged = {"surgery": surgery, "recalibrated": self.judge(network, model, "untrained")}
        return {"cost": cost, "left": left, **judged, "five": five_largest(self.scores(network, row, seed)[1])}

    def repaired(self, network: str, row: str, seed: int, scope: str) -> dict[str, Any]:
        """Top-1 after surgery and least squares on the images that recalibrate the norms of ``untrained``."""
        subject = self.subject(network)
        model, left, dense, plan = self.cut_by_plan(network, row, seed, scope)
        ids = np.sort(subject.calibration(RECALIBRATION, seed))
        start, used = time.perf_counter(), time.process_time()
        Repairer(subject.train, ids, subject.machine.comm, Tracker(False)).run(dense, model, subject.channels, plan)
        took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
        return {"left": left, "images": len(ids), "took": took, "repaired": self.judge(network, model, "untrained")}

    def finetuned(self, network: str, row: str, seed: int, scope: str) -> dict[str, Any]:
        """Top-1 after the fixed finetune of the network with recalibrated norms."""
        subject = self.subject(network)
        model, left = self.cut(network, row, seed, scope)
        self.recalibrate(network, model, seed)
        settings = Training(
            epochs=self.epochs, batch=128, lr=0.01, nesterov=True, weight_decay=5e-4, schedule="cosine",
            selection="last", precision="bf16", channels_last=True,
        )  # fmt: skip
        loop = Loop(settings, subject.train, subject.machine, Tracker(False), seed, "finetune", subject.usable)
        start, used = time.perf_counter(), time.process_time()
        history = Trainer(model, loop, lambda network: {}, classes=len(subject.train.source.classes)).run()
        took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
        return {
            "left": left, "images": len(subject.usable), "took": took,
            "loss": [epoch["loss"] for epoch in history], "finetuned": self.judge(network, model.eval(), "finetune"),
        }  # fmt: skip


def five_largest(scores: Mapping[str, Tensor]) -> float | None:
    """The share of all squared gradients of gates that the five largest micro-batches (or images) hold, or None."""
    gates = [table for name, table in scores.items() if name.endswith(":gate")]
    if not gates:
        return None
    rows = torch.stack([table.double().square().sum(1) for table in gates]).sum(0)
    return float(rows.sort(descending=True).values[:5].sum() / rows.sum())
