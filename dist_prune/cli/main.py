"""``dist-prune list | check | plan | report | compare | score-many | sweep | launch | export ...``: before and after.

run.py does the work.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_prune import methods, safe_parsing
from dist_prune.cli import compare, export, plan, ratio_curves, score_many, slurm
from dist_prune.config import loading
from dist_prune.errors import PruneError, path_trouble, shown


def main(arguments: list[str] | None = None) -> int:
    """0 when all is well, 1 where doctor found something missing, 2 for an error that its text explains."""
    parser = argparse.ArgumentParser(prog="dist-prune", description="Structured pruning, distributed.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("list", help="what there is")
    listing.add_argument("what", choices=("methods", "recipes", "backbones", "keys"))
    listing.add_argument("pattern", nargs="?", default="", help="a glob, for backbones; a method, for its keys")
    checking = verbs.add_parser("check", help="what a run would refuse, and a recipe's channel groups")
    checking.add_argument("recipe", help="a YAML file, or a name in recipes/")
    checking.add_argument(
        "--assume", action="store_true", help="data, checkpoints and scores of other runs are on another machine"
    )
    checking.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_arguments(verbs.add_parser("plan", help="a plan from a run or a file: read it, show it, write it"))
    reporting = verbs.add_parser("report", help="the result of a run")
    reporting.add_argument("run", help="a run directory")
    compare.add_arguments(verbs.add_parser("compare", help="many runs: one table, one page with Pareto plots"))
    score_many.add_arguments(
        verbs.add_parser("score-many", help="several criteria in one pass, compared at one target")
    )
    ratio_curves.add_arguments(
        verbs.add_parser("ratio-curves", help="what each channel group alone can lose, not finetuned")
    )
    importing = verbs.add_parser(
        "import-checkpoint", help="a foreign checkpoint's weights as safetensors, without running code"
    )
    importing.add_argument("file", help=".pth, .pt, .th, .tar or .safetensors")
    importing.add_argument("--key", default="auto", help="which of several weights: auto, ema, or an entry's name")
    importing.add_argument("--skip", nargs="+", default=[], metavar="GLOB", help="names in the file to leave out")
    importing.add_argument("--out", required=True, help="the .safetensors file to write")
    slurm.add_arguments(verbs)
    export.add_arguments(verbs)
    making = verbs.add_parser("make-ffcv", help="write one split of a data set as an FFCV file with a sidecar")
    making.add_argument("--source", required=True, help="an image folder, an .npz file, or a recipe")
    making.add_argument("--split", choices=("train", "eval"), default="train", help="where the source has both")
    making.add_argument("--out", help="the .beton file; default: beside the data, where data.backend=auto finds it")
    making.add_argument("--max-resolution", type=int, default=256, help="longer sides are shrunk to this many pixels")
    making.add_argument("--quality", type=int, default=90, help="of JPEG, 1 to 100")
    making.add_argument("--write-mode", choices=("jpg", "raw", "proportion"), default="jpg")
    making.add_argument("--workers", type=int, default=0, help="encoding processes; default: one per core")
    examining = verbs.add_parser("doctor", help="what is installed, what is missing, what mends it")
    examining.add_argument(
        "--build-engine", action="store_true", help="compile now what DeepSpeed would compile at its first use on a CPU"
    )
    for verb in verbs.choices.values():
        verb.add_argument("--json", action="store_true", help="for machines")
    words = sys.argv[1:] if arguments is None else arguments
    words = sorted(words, key=lambda word: word == "--json")  # the flag may stand anywhere
    given, more = parser.parse_known_args(words)
    keys = getattr(given, "words", getattr(given, "overrides", None))
    if more:  # key=value behind an option
        if keys is None or any(word.startswith("-") for word in more):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        keys += more
    try:
        acts = {
            "list": _list, "check": _check, "report": _report, "doctor": _doctor,
            "import-checkpoint": _import_checkpoint, "make-ffcv": _make_ffcv, "plan": plan.run,
            "compare": compare.run, "score-many": score_many.run, "ratio-curves": ratio_curves.run,
            **slurm.ACTS, **export.ACTS,
        }  # fmt: skip
        _check_places(given)
        quiet = given.json and given.verb != "ratio-curves"  # which prints by itself, and keeps this by itself
        with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
            text, body, code = acts[given.verb](given)
    except PruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read what is said meanwhile has gone
        return _unheard(1)
    try:
        if body is not None:  # ratio-curves has said it, on the first of its processes
            print(json.dumps(body, indent=1) if given.json else text)
        sys.stdout.flush()
    except BrokenPipeError:  # dist-prune list backbones | head
        return _unheard(code)
    return code


def _unheard(code: int) -> int:
    """Nobody reads stdout any more: what is left in its buffer goes nowhere, also at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


Answer = tuple[str, Any, int]
PLACES = (
    "bundle", "destination", "file", "from_json", "images", "out", "recipe", "run", "run_dir", "runs", "source",
    "sweep", "to_json",
)  # fmt: skip


def _check_places(given: argparse.Namespace) -> None:
    """PruneError for an argument that can be no path: asking the system for it would raise, not answer."""
    for name in PLACES:
        value = getattr(given, name, None)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (trouble := path_trouble(text)):
                raise PruneError(f"{name.replace('_', '-')}: {trouble}")


def _list(given: argparse.Namespace) -> Answer:
    if given.what == "methods":
        found = {}
        for name in methods.list_names():
            try:
                found[name] = methods.find(name).paper
            except PruneError as error:
                found[name] = f"cannot be used: {error}"
        width = max(map(len, found))
        return "\n".join(f"{name:{width}}  {paper}" for name, paper in found.items()), found, 0
    if given.what == "keys":
        text = loading.reference(methods.options_of(given.pattern), "method.") if given.pattern else loading.reference()
        return text, [line.split(" | ")[0].strip("| `") for line in text.splitlines()[2:]], 0
    if given.what == "recipes":
        files = {name: str(file) for name, file in loading.known_recipes().items()}
        return "\n".join(f"{name:32}  {path}" for name, path in sorted(files.items())), files, 0
    from dist_prune import models

    names = models.list_names(given.pattern)
    return "\n".join(names), names, 0


def _check(given: argparse.Namespace) -> Answer:
    from dist_prune import models
    from dist_prune.cli.check import as_text, preview
    from dist_prune.pipeline import recipe_checks

    try:
        recipe = loading.load(given.recipe, given.overrides, methods.options_of, need_environment=not given.assume)
    except loading.UnsetError as error:
        raise PruneError(f"{error}\n{recipe_checks.ASSUME}") from error
    method = methods.build(recipe.method)
    absent = [*recipe_checks.missing_files(recipe), *recipe_checks.missing_image_folders(recipe.data)]
    if absent and not given.assume:
        raise PruneError("\n".join([*absent, recipe_checks.ASSUME]))
    body = preview(recipe, method)
    network = recipe.backbone.name, body["classes"], body["input"][0], False, recipe.backbone.kwargs
    known = None if body["assumed"] else body["classes"]
    wrong = recipe_checks.contradictions(recipe, method, models.create(*network), known)
    if wrong:
        raise PruneError("\n".join(wrong))
    body["not_here"] = absent
    return "\n".join([*(f"assumed to be there where it runs: {line}" for line in absent), as_text(body)]), body, 0


def _report(given: argparse.Namespace) -> Answer:
    from dist_prune.report.tables import table

    file = Path(given.run) / "report.json"
    if not file.is_file():
        raise PruneError(f"{given.run} holds no report.json: no run has finished there yet")
    try:
        body = safe_parsing.read_json(file)
        text = f"{body['name']}, plan {body['plan']['fingerprint'][:16]}\n\n{table(body)}"
    except Exception as error:  # whatever values of other types make the table stumble over
        raise PruneError(f"{file} is damaged: {shown(error)}; run the recipe again to write it anew") from error
    return text, body, 0


def _import_checkpoint(given: argparse.Namespace) -> Answer:
    from dist_prune.distributed import tensor_files

    out = Path(given.out)
    if out.suffix != ".safetensors":
        raise PruneError(f"--out: {out} must end in .safetensors")
    said: list[str] = []
    weights = tensor_files.read_weights(Path(given.file), given.key, given.skip, say=said.append)
    tensor_files.save_tensors(out, weights)
    count = sum(tensor.numel() for tensor in weights.values())
    body = {"file": str(out), "tensors": len(weights), "parameters": count, "said": said}
    return "\n".join([*said, f"{out}: {len(weights)} tensors, {count:,} values"]), body, 0


def _make_ffcv(given: argparse.Namespace) -> Answer:
    from dist_prune.data.datasets import check_labels, open_source
    from dist_prune.data.ffcv.backend import import_loader
    from dist_prune.data.open_split import beton_path
    from dist_prune.distributed.cpu_count import cores

    import_loader()
    from dist_prune.data.ffcv.encoder import Settings
    from dist_prune.data.ffcv.writer import write_beton

    source, root, split, layout = _origin(given)
    train = given.split == "train"
    out = Path(given.out) if given.out else beton_path(source, root, split, train)
    if out is None or out.suffix != ".beton":
        raise PruneError(f"--out: {out or source} must be a path that ends in .beton")
    settings = Settings(given.max_resolution, given.quality, given.write_mode)
    opened = open_source(source, root, split, train, lambda text: print(text, file=sys.stderr), layout)
    check_labels(opened, f"the images of {given.source}")
    origin = {"kind": source, "root": root, "split": split}

    def bar(done: int, count: int) -> tqdm:
        return tqdm(total=count, initial=done, desc="images", unit="", smoothing=0.1)

    workers = given.workers or cores()
    facts = write_beton(opened, origin, out, settings, workers, lambda text: print(text, file=sys.stderr), bar)
    text = f"{out}: {facts['count']:,} images of {len(facts['classes'])} classes, {facts['bytes'] / 2**20:,.1f} MiB"
    return text, facts | {"file": str(out)}, 0


def _origin(given: argparse.Namespace) -> tuple[str, str | None, str, str | None]:
    """data.source, data.root, the name of the split that ``--source`` means, and data.layout."""
    path = Path(given.source).expanduser()
    if path.is_dir():
        split = "train" if given.split == "train" else "val"
        return (
            ("imagefolder", str(path), split, None)
            if (path / split).is_dir()
            else ("imagefolder", str(path.parent), path.name, None)
        )
    if path.suffix == ".npz":
        return "npz", str(path), given.split, None
    data = loading.load(given.source, [], methods.options_of).data
    return data.source, data.root, data.train_split if given.split == "train" else data.eval_split, data.layout


def _doctor(given: argparse.Namespace) -> Answer:
    from dist_prune.cli.doctor import as_text, run_checks

    if given.build_engine:
        from dist_prune.distributed.environment import build_engine

        return f"built {build_engine()}", {"built": True}, 0
    findings = run_checks()
    return as_text(findings), findings, int(any(item["state"] == "missing" and item["needed"] for item in findings))


if __name__ == "__main__":
    sys.exit(main())
