"""What a recipe would cut, before images are gone through: groups, who is protected and why, the reachable sizes."""

from pathlib import Path
from typing import Any

import torch

from dist_prune.config.recipe import Recipe
from dist_prune.methods.method import Method
from dist_prune.pruning.channels import Channels
from dist_prune.pruning.choose import Request, reachable
from dist_prune.pruning.cost import COSTS, countable
from dist_prune.pruning.trial import check_logits, sites_of
from dist_prune.runtime import backbones
from dist_prune.runtime.data.numbering import in_order, listed, told, warning
from dist_prune.runtime.data.sources import KNOWN, check_figures, class_folders, npz_shape


def traced(spec: Recipe, method: Method) -> tuple[Channels, int, str]:
    """The channels of the recipe's backbone, built on the CPU, that the method can judge; classes; what was assumed.

    Classes and channels of the data come from the data set's definition; an image folder or an .npz that is there is
    asked, otherwise 1,000 classes (image folder) or 10 (npz) are assumed, and said.
    """
    classes, in_chans, side, assumed = _shape(spec)
    model = backbones.create(spec.backbone.name, classes, in_chans, False, spec.backbone.kwargs).eval()
    config = backbones.image_config(model, in_chans)
    size = spec.data.image_size or side or config["input_size"][1]
    check_figures(spec.data.mean, spec.data.std, in_chans)
    example = torch.randn(1, in_chans, size, size)
    channels = sites_of(model, example)
    check_logits(model, example, spec.backbone.name)
    return method.limits(channels), classes, assumed


def preview(spec: Recipe, method: Method) -> dict[str, Any]:
    """The channel groups of a recipe's backbone: who leads, who follows, who is left alone and why."""
    channels, classes, assumed = traced(spec, method)
    request = Request.of(spec)
    if not spec.select.plan:
        channels = method.ready(channels, spec.select.exclude, request)
    groups = [
        {
            "name": group.name,
            "width": group.width,
            "unit": group.unit,
            "layers": list(group.layers),
            "producers": list(group.producers),
            "protected": group.protected,
        }
        for group in channels.groups
    ]
    return {
        "recipe": spec.written(),
        "input": list(channels.example),
        "classes": classes,
        "assumed": assumed,
        "notes": _notes(spec),
        "dense": {c.name: c.of(channels) for c in COSTS.values() if c.figure and c.summary},
        "reachable": {c.name: list(reachable(channels, request, c.name)) for c in countable()},
        "range": {
            c.name: [round(s * c.of(channels)) for s in reachable(channels, request, c.name)] for c in countable()
        },
        "groups": groups,
        "warnings": [] if spec.select.plan else list(method.cautions(channels)),
    }


def _notes(spec: Recipe) -> list[str]:
    """Where the dense weights come from, and who numbers the classes of an image folder that is here."""
    data, epochs, out = spec.data, spec.train.epochs, []
    weights = spec.backbone.checkpoint or ("fetched by timm" if spec.backbone.pretrained else "")
    if weights:
        used = f"is trained from them for {epochs} epochs, a head of other classes made anew" if epochs else "has them"
        out.append(f"weights: {weights}; the dense network {used}")
    folders = data.source == "imagefolder"
    found, left = class_folders(data.root, data.train_split, data.eval_split) if folders else ((), "")
    if found:
        classes = listed(Path(data.class_map)) if data.class_map else in_order(found, data.class_order)
        out.append(told(classes, 0, len(found), data.class_order, data.class_map) + left)
        kept = spec.backbone.checkpoint or backbones.classes_fetched(spec.backbone.name) == len(classes)
        mixed = warning(found, data.class_order, data.class_map, weights) if weights and kept else ""
        out += [mixed] if mixed else []
    return out


def _shape(spec: Recipe) -> tuple[int, int, int | None, str]:
    """(classes, channels, native side or None, what was assumed)."""
    data = spec.data
    if data.source in KNOWN:
        classes, colours, side = KNOWN[data.source]
        return len(data.classes or ()) or classes, colours, side, ""
    if data.source == "imagefolder":
        found, _ = class_folders(data.root, data.train_split, data.eval_split)
        count = len(listed(Path(data.class_map))) if found and data.class_map else len(found)
        return (count, 3, None, "") if found else (1000, 3, None, "1,000 classes: the image folder is not here")
    found = npz_shape(data.root, data.layout, data.image_size)
    return (*found, "") if found else (10, 3, 32, "10 classes of 3x32x32 images: the .npz file is not here")


def as_text(body: dict[str, Any]) -> str:
    """The preview for a terminal."""
    spec, dense = body["recipe"], body["dense"]
    lines = [
        f"{spec['name']}: {spec['backbone']['name']}, method {spec['method']['name']}, "
        f"input {'x'.join(map(str, body['input']))}, {body['classes']} classes",
        f"dense: {dense['macs'] / 1e6:,.2f} M MACs ({dense['thop'] / 1e6:,.2f} M by thop), {dense['params']:,} params"
        + "".join(f", {n:,} {COSTS[name].unit}" for name, n in dense.items() if name not in ("macs", "thop", "params")),
        *([f"assumed {body['assumed']}"] if body["assumed"] else []),
        *body["notes"],
        "",
        f"{'group (its leader)':40} {'width':>6}  layers that change with it",
    ]
    for group in body["groups"]:
        followers = [layer for layer in group["layers"] if layer != group["name"]]
        shown = ", ".join(followers[:4]) + (f", ... {len(followers)} in all" if len(followers) > 4 else "")
        units = "" if group["unit"] == "channel" else f"({group['unit']}s) "
        lines.append(f"{group['name']:40} {group['width']:6}  {units}{shown}")
        if group["protected"]:
            lines.append(f"{'':47}  PROTECTED: {group['protected']}")
    free = sum(not group["protected"] for group in body["groups"])
    ranges = ", ".join(
        f"{q} {low:,} to {high:,} ({body['reachable'][q][0]:.1%} to 100 %)" for q, (low, high) in body["range"].items()
    )
    said = [f"warning: {text}" for text in body["warnings"]]
    return "\n".join(
        [*lines, "", *said, f"{free} of {len(body['groups'])} groups are free; what can be left: {ranges}"]
    )
