"""What a recipe would cut, before images are gone through: groups, who is protected and why, the reachable sizes."""

from pathlib import Path
from typing import Any

import torch

from dist_prune import models
from dist_prune.config.recipe import Recipe
from dist_prune.data.class_order import class_order_warning, describe_order, read_class_map, sort_classes
from dist_prune.data.datasets import KNOWN, check_normalisation, class_folders, npz_shape
from dist_prune.methods.base import Method
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.cost import COSTS, counted_costs
from dist_prune.pruning.selection.ranking import SelectionRequest, reachable
from dist_prune.pruning.surgery.verified_trace import check_logits, trace_groups


def trace_backbone(recipe: Recipe, method: Method) -> tuple[DependencyGraph, int, str]:
    """The channels of the recipe's backbone, built on the CPU, that the method can judge; classes; what was assumed.

    Classes and channels of the data come from the data set's definition; an image folder or an .npz that is there is
    asked, otherwise 1,000 classes (image folder) or 10 (npz) are assumed, and said.
    """
    classes, in_chans, side, assumed = _shape(recipe)
    model = models.create(recipe.backbone.name, classes, in_chans, False, recipe.backbone.kwargs).eval()
    config = models.image_config(model, in_chans)
    size = recipe.data.image_size or side or config["input_size"][1]
    check_normalisation(recipe.data.mean, recipe.data.std, in_chans)
    example = torch.randn(1, in_chans, size, size)
    graph = trace_groups(model, example)
    check_logits(model, example, recipe.backbone.name)
    return method.prunable(graph), classes, assumed


def preview(recipe: Recipe, method: Method) -> dict[str, Any]:
    """The channel groups of a recipe's backbone: who leads, who follows, who is left alone and why."""
    graph, classes, assumed = trace_backbone(recipe, method)
    request = SelectionRequest.of(recipe)
    if not recipe.select.plan:
        graph = method.prepare(graph, recipe.select.exclude, request)
    groups = [
        {
            "name": group.name,
            "width": group.width,
            "unit": group.unit,
            "layers": list(group.layers),
            "producers": list(group.producers),
            "protected": group.protected,
        }
        for group in graph.groups
    ]
    return {
        "recipe": recipe.written(),
        "input": list(graph.example),
        "classes": classes,
        "assumed": assumed,
        "notes": _notes(recipe),
        "dense": {c.name: c.of(graph) for c in COSTS.values() if c.figure and c.summary},
        "reachable": {c.name: list(reachable(graph, request, c.name)) for c in counted_costs()},
        "range": {c.name: [round(s * c.of(graph)) for s in reachable(graph, request, c.name)] for c in counted_costs()},
        "groups": groups,
        "warnings": [] if recipe.select.plan else list(method.cautions(graph)),
    }


def _notes(recipe: Recipe) -> list[str]:
    """Where the dense weights come from, and who numbers the classes of an image folder that is here."""
    data, epochs, out = recipe.data, recipe.train.epochs, []
    weights = recipe.backbone.checkpoint or ("fetched by timm" if recipe.backbone.pretrained else "")
    if weights:
        used = f"is trained from them for {epochs} epochs, a head of other classes made anew" if epochs else "has them"
        out.append(f"weights: {weights}; the dense network {used}")
    folders = data.source == "imagefolder"
    found, left = class_folders(data.root, data.train_split, data.eval_split) if folders else ((), "")
    if found:
        classes = read_class_map(Path(data.class_map)) if data.class_map else sort_classes(found, data.class_order)
        out.append(describe_order(classes, 0, len(found), data.class_order, data.class_map) + left)
        kept = recipe.backbone.checkpoint or models.pretrained_classes(recipe.backbone.name) == len(classes)
        mixed = class_order_warning(found, data.class_order, data.class_map, weights) if weights and kept else ""
        out += [mixed] if mixed else []
    return out


def _shape(recipe: Recipe) -> tuple[int, int, int | None, str]:
    """(classes, channels, native side or None, what was assumed)."""
    data = recipe.data
    if data.source in KNOWN:
        classes, colours, side = KNOWN[data.source]
        return len(data.classes or ()) or classes, colours, side, ""
    if data.source == "imagefolder":
        found, _ = class_folders(data.root, data.train_split, data.eval_split)
        count = len(read_class_map(Path(data.class_map))) if found and data.class_map else len(found)
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
