"""report.json for machines, report.html for people, figures for TensorBoard."""

import csv
import json
from typing import Any

import yaml
from matplotlib.figure import Figure

from dist_prune.documents import strict_json
from dist_prune.ledger import flatten
from dist_prune.pruning.cost import tabled
from dist_prune.pruning.portrait import Curve, Portrait
from dist_prune.pruning.rounds import scheduled
from dist_prune.stages import page, timing
from dist_prune.stages.order import at, order
from dist_prune.stages.work import Made, Work

TELLING = (
    "score",
    "method",
    "select",
    "target",
    "schedule",
    "finetune",
    "reruns",
)  # sections; the rest is the same in a sweep
ALWAYS = ("seed", "backbone.name", "method.name", "finetune.epochs", "finetune.lr", "score.images", "select.threshold")
MORE = (("select", "table"), ("finetune", "reruns"))  # facts that only some runs have


def act(work: Work) -> Made:
    """metrics.json, plan.json and the ledger -> report.json, report.html"""
    body = collect(work)
    histories = {name: _fact(work, name, "history") or [] for name in labels(work) if _trains(name)}
    shown, lines = pictures(work)
    _tensorboard(work, body, shown)
    work.tracker.say("\n" + page.table(body))
    folder = work.folder.resolve()
    work.tracker.say(
        f"\nreport       {folder / 'report.html'}\nbundle       {folder / 'export'}"
        f"   python -c \"import dist_prune; dist_prune.load('{work.folder / 'export'}')\""
        f"\nTensorBoard  tensorboard --logdir {work.folder / 'tensorboard'}"
    )
    text = yaml.safe_dump(body["recipe"], sort_keys=False)
    return Made({}, texts={
        "report.json": strict_json(body),
        "report.html": page.html(body, histories, text, shown, lines, planes(work)),
    })  # fmt: skip


def planes(work: Work) -> dict[str, Figure]:
    """Plot of curves.csv, where curves were asked for."""
    rows = list(csv.DictReader((work.folder / "curves.csv").read_text().splitlines()))
    return {"Every number of kept filters, one group at a time, not finetuned": page.plane_figure(rows)} if rows else {}


def pictures(work: Work) -> tuple[list[Portrait], list[Curve]]:
    """The method's pictures of its groups and its curves; none where a plan was replayed, which has no scores."""
    if work.recipe.select.plan:
        return [], []
    channels = work.method.ready(work.channels, work.recipe.select.exclude, work.request)
    cost = work.request.cost
    if cost is not None and cost.measured:  # one round; its methods ask again for the network within the time
        channels = timing.known(channels, _fact(work, "select", "latency"))
    spec = work.recipe.schedule  # the dense network's scores and what the first round is asked for
    first = scheduled(work.request, channels, 1, spec.rounds, spec.spacing)
    asked = (work.tensors("round_1/scores.safetensors"), channels, first)
    return list(work.method.portraits(*asked)), list(work.method.curves(*asked))


def collect(work: Work) -> dict[str, Any]:
    """The body of report.json."""
    plan, channels = work.plan, work.channels
    metrics = json.loads((work.folder / "metrics.json").read_text())
    groups = [
        {
            "name": group.name, "layers": list(group.layers), "width": group.width, "unit": group.unit,
            "kept": plan.counts[group.name], "reason": plan.reasons.get(group.name, ""),
        }
        for group in channels.groups
    ]  # fmt: skip
    asked = work.recipe.target.asked()
    environment = json.loads((work.folder / "environment.json").read_text())
    stages, rounds = labels(work), work.recipe.schedule.rounds
    lines = {name: work.ledger.last(name) for name in stages}
    skipped = [event for event in work.events if event["event"] == "skipped"]
    return {
        "name": work.recipe.name,
        "recipe": work.recipe.written(),
        **({"expanded": work.recipe.expanded} if work.recipe.expanded else {}),
        "seed": work.recipe.seed,
        "world_size": environment["world_size"],
        "commit": environment.pop("commit"),
        "environment": environment,
        "images": work.images,
        "skipped_images": {name: found for name in stages if (found := _fact(work, name, "skipped_images"))},
        **{name: metrics[name] for name in ("dense", "pruned", "finetuned")},
        "plan": {"fingerprint": plan.fingerprint, "groups": groups},
        "target": dict([asked]) if asked else {},
        "achieved": _fact(work, "select" if rounds == 1 else at(rounds, "select"), "achieved"),
        **({"rounds": metrics["rounds"]} if rounds > 1 else {}),
        **{key: _fact(work, stage, key) for stage, key in MORE if _fact(work, stage, key)},
        "communication": {name: line["said"] for name, line in lines.items() if line and line.get("said")},
        **({"many": _fact(work, "many", "table")} if work.recipe.score.many else {}),
        **({"many_images": _fact(work, "many", "images")} if work.recipe.score.many else {}),
        "timings": {name: line["seconds"] for name, line in lines.items() if line},
        "events": [e for line in lines.values() if line for e in line.get("events", [])] + skipped,
    }


def labels(work: Work) -> list[str]:
    """The stages of this run by their names in the ledger, without curves and report."""
    spec = work.recipe.schedule
    return [s.label for s in order(spec.rounds, spec.carry_optimizer) if s.name not in ("curves", "report")]


def _trains(label: str) -> bool:
    return label.rpartition("/")[2] in ("train", "finetune")


def _fact(work: Work, stage: str, name: str) -> Any:
    line = work.ledger.last(stage)
    return line["facts"].get(name) if line else None


def _tensorboard(work: Work, body: dict[str, Any], shown: list[Portrait]) -> None:
    """Kept channels and the groups' portraits as pictures, the plan as a table, the keys that say what this run was."""
    groups, tuned = body["plan"]["groups"], body["finetuned"]
    work.tracker.figure("plan/kept channels", page.groups_figure(groups, width=5.5))
    lines = [f"| {g['name']} | {g['width']} | {g['kept']} | {g['reason'].replace('|', '/')} |" for g in groups]
    head = "| group | width | kept | why nothing was cut |\n| --- | --- | --- | --- |\n"
    work.tracker.text("plan/groups", f"{page.aim(body)}\n\n{head}" + "\n".join(lines))
    for portrait in shown:
        work.tracker.picture(f"likeness/{portrait.group}", portrait.picture())
    sizes = [cost.name for cost in tabled()]
    metrics = {f"final/{key}": float(tuned[key]) for key in ("top1", "loss", *sizes) if tuned.get(key) is not None}
    for line in body.get("rounds", []):
        figures = {key: value for key, value in line.items() if key != "round" and value is not None}
        work.tracker.scalars({f"rounds/{key}": float(value) for key, value in figures.items()}, line["round"])
    work.tracker.hparams(telling(work), metrics)


def telling(work: Work) -> dict[str, Any]:
    """The keys that tell runs apart: those that differ from their defaults, and what runs are always asked for."""
    given = flatten(work.recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True))
    keys = {key for key in given if key.split(".")[0] in TELLING} | {*ALWAYS}
    whole = flatten(work.recipe.written())
    return {key: whole[key] for key in sorted(keys) if whole.get(key) is not None}
