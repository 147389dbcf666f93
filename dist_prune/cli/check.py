"""``dist-prune check``: what a run would refuse, and a recipe's channel groups with the sizes that can be reached."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_prune import methods, tasks
from dist_prune.cli.verb import Answer, add_recipe
from dist_prune.config import loading
from dist_prune.config.data import SHARDS, Data
from dist_prune.config.recipe import Recipe
from dist_prune.data.box_layouts import class_count
from dist_prune.data.class_order import class_order_warning, describe_order, read_class_map, sort_classes
from dist_prune.data.datasets import KNOWN, OPENERS, DatasetKeys, class_folders, dataset_shape, npz_shape, open_source
from dist_prune.data.mask_folder import count_classes
from dist_prune.data.split_checks import check_normalisation, check_splits, empty_first_class
from dist_prune.data.transform_config import sides_of
from dist_prune.errors import MISSED, PruneError
from dist_prune.methods.base import Method, RankingMethod
from dist_prune.pipeline.images import config_size
from dist_prune.pipeline.start_network import StartNetwork
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.repair.cost import repair_cost
from dist_prune.pruning.rng import seeded_generator
from dist_prune.pruning.selection.cost import COSTS, counted_costs
from dist_prune.pruning.selection.ranking import SelectionRequest, counts_of, reachable, select_by_score
from dist_prune.pruning.surgery.verified_trace import trace_groups


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    add_recipe(parser)
    parser.add_argument(
        "--assume", action="store_true", help="assume that data, checkpoints and scores are on another machine"
    )


def run(arguments: argparse.Namespace) -> Answer:
    """Read the recipe, trace its network, and check both as a run does before its work.

    Raises:
        PruneError: with everything that a run would refuse.
    """
    from dist_prune.pipeline import recipe_checks

    try:
        need_environment = not arguments.assume
        recipe = loading.load(arguments.recipe, arguments.overrides, methods.options_of, need_environment)
    except loading.UnsetError as error:
        raise PruneError(f"{error}\n{recipe_checks.ASSUME}") from error
    method = methods.build(recipe.method)
    if unfit := recipe_checks.task_problems(recipe, method, tasks.build(recipe.task)):
        raise PruneError("\n".join(unfit))
    data = recipe.data
    absent = [
        *recipe_checks.missing_files(recipe),
        *recipe_checks.missing_image_folders(data),
        *recipe_checks.staging_trouble(data),
    ]
    if absent and not arguments.assume:
        raise PruneError("\n".join([*absent, recipe_checks.ASSUME]))
    model, graph, classes, assumed = _trace(recipe, method)
    body = _describe(recipe, method, graph, classes, assumed)
    problems = recipe_checks.contradictions(recipe, method, model, None if assumed else classes)
    if problems:
        raise PruneError("\n".join(problems))
    body["not_here"] = absent
    return "\n".join([*(f"assumed to be there where it runs: {line}" for line in absent), as_text(body)]), body, 0


def trace_backbone(recipe: Recipe, method: Method) -> tuple[DependencyGraph, int, str]:
    """Build a recipe's backbone on the CPU and trace its channel groups.

    Classes and channels of the data come from the data set's definition. An image folder or an .npz file is read if it
    is on this machine; otherwise 1,000 classes (image folder) or 10 classes (npz) are assumed.

    Returns:
        The dependency graph with the groups that the method can score, the number of classes, and what was assumed
        (an empty text if nothing).
    """
    return _trace(recipe, method)[1:]


def _trace(recipe: Recipe, method: Method) -> tuple[nn.Module, DependencyGraph, int, str]:
    """The network in evaluation mode, and what ``trace_backbone`` returns."""
    from dist_prune import models  # timm takes seconds to import
    from dist_prune.cli.trial_cut_cache import TrialCutCache
    from dist_prune.models.repeated_weights import RepeatedWeights
    from dist_prune.pipeline.recipe_checks import check_outputs

    task = tasks.build(recipe.task)
    classes, in_chans, native_side, assumed = _image_shape(recipe.data)
    with RepeatedWeights():
        model = models.create(recipe.backbone.name, classes, in_chans, False, recipe.backbone.kwargs).eval()
    config = models.image_config(model, in_chans)
    start = StartNetwork(recipe.backbone) if recipe.backbone.bundle else None
    if start is not None:
        config |= start.image_config()
    size = recipe.data.image_size or native_side or config_size(config["input_size"])
    check_normalisation(recipe.data.mean, recipe.data.std, in_chans)
    example = torch.randn(1, in_chans, *sides_of(size))
    spec = recipe.backbone
    depth = bool(recipe.select.depth or (start is not None and start.plan.blocks_removed))
    known = TrialCutCache(spec.name, classes, in_chans, spec.kwargs)
    graph = trace_groups(model, example, spec.protect, spec.streams, spec.units, depth, known.verify)
    check_outputs(task, model, example, classes, recipe.backbone.name)
    if start is not None:
        graph = start.graph_of(graph)
    return model, method.prunable(graph.protect_producers(task.protect(graph.producers))), classes, assumed


def preview(recipe: Recipe, method: Method) -> dict[str, Any]:
    """Describe the channel groups of a recipe's backbone and the sizes that pruning can reach.

    Returns:
        JSON-ready values: the recipe, input shape, classes, notes, dense costs, reachable shares and amounts of each
        counted cost, and for each group its name, width, unit, layers, producers and why it is protected.
    """
    return _describe(recipe, method, *trace_backbone(recipe, method))


def _describe(recipe: Recipe, method: Method, graph: DependencyGraph, classes: int, assumed: str) -> dict[str, Any]:
    from dist_prune.pipeline import search_checks

    request = SelectionRequest.of(recipe)
    tolerance = getattr(recipe.target, request.cost.tolerance) if request.cost is not None else None
    if not recipe.select.plan:
        graph = method.prepare(graph, recipe.select.exclude, request)
        search_checks.check_targets(recipe, graph)
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
    shares = {cost.name: list(reachable(graph, request, cost.name)) for cost in counted_costs(request.cost)}
    return {
        "recipe": recipe.written(),
        "input": list(graph.example),
        "classes": classes,
        "assumed": assumed,
        "notes": _notes(recipe),
        "dense": {cost.name: cost.of(graph) for cost in COSTS.values() if cost.figure and cost.summary},
        "reachable": shares,
        "range": {
            cost.name: [round(s * cost.of(graph)) for s in shares[cost.name]] for cost in counted_costs(request.cost)
        },
        "groups": groups,
        **({"blocks": [{"path": b.path, "protected": b.protected} for b in graph.blocks]} if graph.blocks else {}),
        **({"planned": planned} if (planned := plan_on_random_scores(graph, request, method)) else {}),
        **({"missed": missed} if (missed := missed_target(graph, request, method, planned, tolerance)) else {}),
        **({"search": search_checks.work_text(recipe.select.search)} if recipe.select.search else {}),
        **({"repair": _repair(recipe, graph)} if recipe.repairs else {}),
        "warnings": [] if recipe.select.plan else list(method.cautions(graph)),
    }


def plan_on_random_scores(graph: DependencyGraph, request: SelectionRequest, method: Method) -> dict[str, float]:
    """What the target leaves if every channel's score is drawn from the seed: sizes hardly depend on the scores.

    Args:
        graph: after ``Method.prepare``.
        request: the recipe's.
        method: the recipe's.

    Returns:
        Name of each counted cost -> what is left, for one image. Empty without a counted target, for methods that do
        not rank channels by ``select_by_score``, and if these blocks do not let the target.
    """
    ranks = isinstance(method, RankingMethod) and type(method).select is RankingMethod.select
    if not ranks or request.target is None or not COSTS[request.target[0]].known(graph):
        return {}
    widths = {g.name: g.width for g in graph.free} | {block.key: 1 for block in graph.free_blocks if request.depth}
    scores = {name: torch.rand(w, generator=seeded_generator(request.seed, name)) for name, w in widths.items()}
    try:
        kept = counts_of(select_by_score(graph, scores, request, method.options.normalise))
    except PruneError:
        if not request.depth:
            raise
        return {}  # which blocks stay is up to the scores, and so is whether a small target can be met
    return {cost.name: cost.of(graph, kept) for cost in counted_costs()}


def missed_target(
    graph: DependencyGraph,
    request: SelectionRequest,
    method: Method,
    planned: dict[str, float],
    tolerance: float | None,
) -> str:
    """Why a run would end with exit code 3, its target missed by more than its tolerance; empty if it would not.

    Args:
        graph: after ``Method.prepare``.
        request: the recipe's.
        method: the recipe's.
        planned: of ``plan_on_random_scores``.
        tolerance: largest miss, as a share of the target; None: any miss is accepted.
    """
    if not planned or tolerance is None or request.target is None or request.cost is None:
        return ""
    quantity, asked = request.target
    dense = request.cost.of(graph)

    def left(share: float) -> float:
        amounts = plan_on_random_scores(graph, replace(request, target=(quantity, share)), method)
        return amounts.get(quantity, 0.0) / dense  # nothing if the blocks that go do not let it

    below = planned[quantity] / dense
    deviation = below / asked - 1
    if abs(deviation) <= tolerance:
        return ""
    low, high = asked, 1.0  # the smallest share whose network is larger than that of the target
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if left(middle) > below + 1e-9 else (middle, high)
    above = left(high)
    share = math.ceil(above * 1e4) / 1e4
    steps = max((request.multiple(group) for group in graph.free), default=1)
    cause = f"; channels go in steps of {steps} (select.round_to)" if steps > 1 else ""
    advice = f"target.{quantity}={share:g}"
    return (
        f"target.{quantity}: {asked:g} is asked for, and with random scores {below:.2%} is left ({deviation:+.1%}), "
        f"more than target.{request.cost.tolerance} {tolerance:.1%} off{cause}: a run would end with exit code "
        f"{MISSED}, after its report. The nearest sizes are {below:.2%} and {above:.2%}: write {advice}"
        + (", lower select.round_to" if steps > 1 else "")
        + f", or write target.{request.cost.tolerance}={math.ceil(abs(deviation) * 100 + 0.1) / 100:g}"
    )


def _repair(recipe: Recipe, graph: DependencyGraph) -> str:
    """What the repair will cost at most: that of the dense widths."""
    method, images = recipe.repair.method, recipe.repair.images
    if method in ("norms", "fold", "none"):
        return f"repair: {recipe.repair_name}, {images:,} images once through one network"
    return f"repair: {recipe.repair_name}, at most {repair_cost(graph, {}).text(images)}"


def _notes(recipe: Recipe) -> list[str]:
    """The origin of the dense weights, and how the classes of an image folder on this machine are numbered."""
    from dist_prune import models

    data, epochs = recipe.data, recipe.train.epochs
    notes = [recipe.choice] if recipe.choice else []
    weights = recipe.backbone.checkpoint or ("fetched by timm" if recipe.backbone.pretrained else "")
    if weights:
        use = f"is trained from them for {epochs} epochs, a head of other classes made anew" if epochs else "has them"
        notes.append(f"weights: {weights}; the dense network {use}")
    folders, left_out, doubt = _class_names(data)
    notes += [doubt] if doubt else []
    if folders:
        classes = read_class_map(Path(data.class_map)) if data.class_map else sort_classes(folders, data.class_order)
        notes.append(describe_order(classes, 0, len(folders), data.class_order, data.class_map) + left_out)
        head_kept = recipe.backbone.checkpoint or models.pretrained_classes(recipe.backbone.name) == len(classes)
        doubt = class_order_warning(folders, data.class_order, data.class_map, weights) if weights and head_kept else ""
        notes += [doubt] if doubt else []
    return notes


def _class_names(data: Data) -> tuple[tuple[str, ...], str, str]:
    """The classes of folders or shards that are here, in text order, a text about files left out, and a warning."""
    if data.source == "imagefolder":
        return *class_folders(data.path, data.train_split, data.eval_split), ""
    splits = _shard_splits(data) if data.source in SHARDS else None
    if splits is None:
        return (), "", ""
    numbered = getattr(splits[0], "numbered", False)
    return () if numbered else splits[0].classes, "", empty_first_class(*splits)


def _shard_splits(data: Data) -> tuple[Any, Any] | None:
    """Both splits of shards; None if they are not here.

    Raises:
        PruneError: a run would refuse their labels or classes.
    """
    try:
        train, test = (
            open_source(data.source, data.root, split, is_train, dataset=DatasetKeys.of(data))
            for split, is_train in ((data.train_split, True), (data.eval_split, False))
        )
    except PruneError:
        return None  # reported as missing
    check_splits(train, test, data.source, data.class_order, data.class_map)
    return train, test


def _image_shape(data: Data) -> tuple[int, int, int | None, str]:
    """(classes, channels, native side or None, what was assumed)."""
    if data.source in KNOWN:
        classes, in_chans, side = KNOWN[data.source]
        return len(data.classes or ()) or classes, in_chans, side, ""
    if data.source == "images":
        return 1, 3, None, ""
    if data.source == "maskfolder":
        count = count_classes(data.path)
        return (count, 3, None, "") if count else (21, 3, None, "21 classes: the folder of masks is not here")
    if data.source in ("boxfolder", "coco"):
        count = class_count(data.source, data.path, data.train_split)
        return (count, 3, None, "") if count else (80, 3, None, "80 classes: the annotation file is not here")
    if data.source == "imagefolder":
        folders, _ = class_folders(data.path, data.train_split, data.eval_split)
        if not folders:
            return 1000, 3, None, "1,000 classes: the image folder is not here"
        return len(read_class_map(Path(data.class_map))) if data.class_map else len(folders), 3, None, ""
    if data.source in SHARDS:
        splits = _shard_splits(data)
        if splits is None:
            return 1000, 3, None, "1,000 classes: the images are not here"
        return len(read_class_map(Path(data.class_map)) if data.class_map else splits[0].classes), 3, None, ""
    if data.source == "checkpoint" and not (data.path and Path(data.path).expanduser().is_file()):
        return 10, 3, 32, "10 classes of 3x32x32 images: the checkpoint is not here"
    if data.source not in OPENERS or data.source == "checkpoint":
        return (*dataset_shape(data), "")
    shape = npz_shape(data.path, data.layout, data.image_size, data.source)
    return (*shape, "") if shape else (10, 3, 32, "10 classes of 3x32x32 images: the .npz file is not here")


def as_text(body: dict[str, Any]) -> str:
    """The result of ``preview`` for a terminal."""
    recipe, dense = body["recipe"], body["dense"]
    lines = [
        f"{recipe['name']}: {recipe['backbone']['name']}, method {recipe['method']['name']}, "
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
        listed = ", ".join(followers[:4]) + (f", ... {len(followers)} in all" if len(followers) > 4 else "")
        units = "" if group["unit"] == "channel" else f"({group['unit']}s) "
        lines.append(f"{group['name']:40} {group['width']:6}  {units}{listed}")
        if group["protected"]:
            lines.append(f"{'':47}  PROTECTED: {group['protected']}")
    if body.get("blocks"):
        paths = [block["path"] for block in body["blocks"] if not block["protected"]]
        lines += ["", f"{len(paths)} residual blocks may go as a whole, all but one of each kind: {', '.join(paths)}"]
    free = sum(not group["protected"] for group in body["groups"])
    ranges = ", ".join(
        f"{cost} {low:,} to {high:,} ({body['reachable'][cost][0]:.1%} to 100 %)"
        for cost, (low, high) in body["range"].items()
    )
    planned = {name: amount for name, amount in body.get("planned", {}).items() if name in dense}
    sizes = ", ".join(f"{amount:,.0f} {name} ({amount / dense[name]:.2%})" for name, amount in planned.items())
    warnings = [
        *([f"with random scores the target leaves {sizes}"] if planned else []),
        *([f"warning: {body['missed']}"] if "missed" in body else []),
        *(body[key] for key in ("search", "repair") if key in body),
        *(f"warning: {text}" for text in body["warnings"]),
    ]
    return "\n".join(
        [*lines, "", *warnings, f"{free} of {len(body['groups'])} groups are free; what can be left: {ranges}"]
    )
