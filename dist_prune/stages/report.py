"""report.json for machines, report.html for people, figures for TensorBoard."""

import json
from typing import Any

import yaml

from dist_prune.ledger import flatten
from dist_prune.pruning.portrait import Portrait
from dist_prune.stages import page
from dist_prune.stages.work import Made, Work

STAGES = ("train", "many", "score", "select", "prune", "finetune", "evaluate", "export")
MORE = (("select", "table"), ("finetune", "reruns"))  # facts that only some runs have


def act(work: Work) -> Made:
    """metrics.json, plan.json and the ledger -> report.json, report.html"""
    body = collect(work)
    histories = {name: _fact(work, name, "history") or [] for name in ("train", "finetune")}
    _tensorboard(work, body)
    work.tracker.say("\n" + page.table(body))
    folder = work.folder.resolve()
    work.tracker.say(
        f"\nreport       {folder / 'report.html'}\nbundle       {folder / 'export'}"
        f"   python -c \"import dist_prune; dist_prune.load('{work.folder / 'export'}')\""
        f"\nTensorBoard  tensorboard --logdir {work.folder / 'tensorboard'}"
    )
    text = yaml.safe_dump(body["recipe"], sort_keys=False)
    return Made({}, texts={
        "report.json": json.dumps(body, indent=1), "report.html": page.html(body, histories, text, portraits(work)),
    })  # fmt: skip


def portraits(work: Work) -> list[Portrait]:
    """The method's pictures of its groups; none where a plan was replayed, which has no scores."""
    if work.recipe.select.plan:
        return []
    channels = work.method.ready(work.channels, work.recipe.select.exclude, work.request)
    return list(work.method.portraits(work.tensors("round_1/scores.safetensors"), channels, work.request))


def collect(work: Work) -> dict[str, Any]:
    """The body of report.json."""
    plan, channels = work.plan, work.channels
    metrics = json.loads((work.folder / "metrics.json").read_text())
    groups = [
        {
            "name": group.name, "layers": list(group.layers), "width": group.width,
            "kept": plan.counts[group.name], "reason": plan.reasons.get(group.name, ""),
        }
        for group in channels.groups
    ]  # fmt: skip
    asked = work.recipe.target.asked()
    environment = json.loads((work.folder / "environment.json").read_text())
    lines = {name: work.ledger.last(name) for name in STAGES}
    skipped = [event for event in work.events if event["event"] == "skipped"]
    return {
        "name": work.recipe.name,
        "recipe": work.tree,
        "seed": work.recipe.seed,
        "world_size": environment["world_size"],
        "commit": environment.pop("commit"),
        "environment": environment,
        "images": work.images,
        "skipped_images": {name: found for name in STAGES if (found := _fact(work, name, "skipped_images"))},
        **{name: metrics[name] for name in ("dense", "pruned", "finetuned")},
        "plan": {"fingerprint": plan.fingerprint, "groups": groups},
        "target": dict([asked]) if asked else {},
        "achieved": _fact(work, "select", "achieved"),
        **{key: _fact(work, stage, key) for stage, key in MORE if _fact(work, stage, key)},
        **({"many": _fact(work, "many", "table")} if work.recipe.score.many else {}),
        "timings": {name: line["seconds"] for name, line in lines.items() if line},
        "events": [e for line in lines.values() if line for e in line.get("events", [])] + skipped,
    }


def _fact(work: Work, stage: str, name: str) -> Any:
    line = work.ledger.last(stage)
    return line["facts"].get(name) if line else None


def _tensorboard(work: Work, body: dict[str, Any]) -> None:
    work.tracker.figure("plan/kept channels", page.groups_figure(body["plan"]["groups"]))
    tuned = body["finetuned"]
    metrics = {
        f"final/{key}": float(tuned[key]) for key in ("top1", "loss", "macs", "params") if tuned[key] is not None
    }
    keys = flatten({k: v for k, v in work.tree.items() if k not in ("name", "report", "cluster")})
    work.tracker.hparams(keys, metrics)
