"""``dist-prune export | latency | push``: a bundle as ONNX or torch.export files, its speed, and on the hub."""

import argparse
import sys
from pathlib import Path
from typing import Any

from dist_prune import methods
from dist_prune.config import loading
from dist_prune.errors import PruneError

KINDS = ("onnx", "onnx-fp16", "onnx-int8", "pt2")
Answer = tuple[str, Any, int]


def add_arguments(verbs: Any) -> None:
    """Add the verbs to ``dist-prune``'s parser."""
    exporting = verbs.add_parser("export", help="a bundle as ONNX or torch.export files, checked on real images")
    exporting.add_argument("bundle", help="a run directory, its export folder, or owner/name on the hub")
    exporting.add_argument("--format", nargs="+", choices=KINDS, default=["onnx", "pt2"])
    exporting.add_argument("--out", help="folder for the files; default: the bundle's own")
    exporting.add_argument("--images", help="image folder or .npz to check on; default: the run's evaluation images")
    exporting.add_argument(
        "--count", type=int, default=64, help="images to check on, and for int8 as many to calibrate"
    )
    timing = verbs.add_parser("latency", help="measured time of a bundle's network, dense against pruned")
    timing.add_argument("bundle", help="a run directory, its export folder, or owner/name on the hub")
    timing.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    timing.add_argument("--repeats", type=int, default=20, help="timed passes of each network at each batch size")
    timing.add_argument("--threads", type=int, default=0, help="CPU threads; default: all this process may use")
    timing.add_argument("--device", help="default: a GPU where there is one")
    timing.add_argument("--fold", action="store_true", help="both with their batch norms folded, as they are served")
    pushing = verbs.add_parser("push", help="a bundle with its model card to the Hugging Face hub, or to a folder")
    pushing.add_argument("bundle", help="a run directory or its export folder")
    pushing.add_argument("destination", help="owner/name on the hub, or a path that begins with ./ or /")
    pushing.add_argument("--private", action="store_true")


# The acts import what they need themselves: timm and its kin take seconds, and most verbs need none of them.


def _export(given: argparse.Namespace) -> Answer:
    from dist_prune.export import bundle, formats

    found = bundle.read_bundle(given.bundle)
    place = _folder(given.bundle)
    if given.out is None and place is None:
        raise PruneError(f"--out: {given.bundle} is on the hub; name a folder for the files")
    out = Path(given.out) if given.out else place
    assert out is not None
    out.mkdir(parents=True, exist_ok=True)
    model = found.small()
    images = _images(given, found, place, False)
    calibration = _images(given, found, place, True) if "onnx-int8" in given.format else None
    facts = {
        "backbone": found.body["backbone"]["name"], "plan": found.plan.fingerprint,
        "mean": str(found.body["image"]["mean"]), "std": str(found.body["image"]["std"]),
        "size": str(found.body["image"]["size"]), "classes": "\n".join(found.body["classes"]),
    }  # fmt: skip
    lines: list[str] = []
    body: dict[str, Any] = {}
    for kind in given.format:
        file = out / f"model{formats.SUFFIX[kind]}"
        facts_of: dict[str, Any] = {"file": str(file)}
        facts_of |= formats.write(kind, model, images, file, facts, calibration)
        body[kind] = facts_of
        lines.append(
            f"{file}: {facts_of['bytes'] / 2**20:.2f} MiB; on {facts_of['images']} images logits differ by at most "
            f"{facts_of['difference']:.1e} of the largest, {facts_of['same_class']:.1%} get the same class"
        )
    return "\n".join(lines), body, 0


def _latency(given: argparse.Namespace) -> Answer:
    import torch

    from dist_prune.distributed.cpu_count import threads as allowed
    from dist_prune.export import bundle
    from dist_prune.training.latency import check, measure_latency
    from dist_prune.training.timing_noise import speedup_text

    found = bundle.read_bundle(given.bundle)
    models = {"dense": found.dense(), "pruned": found.small()}
    if given.fold:
        models = {name: bundle.fuse(model, found.shape) for name, model in models.items()}
    _within("--repeats", given.repeats, 10**6)
    check(found.small(), found.shape, given.batches, given.threads or None, torch.device(given.device or "cpu"))
    threads, device = given.threads or allowed(), given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    times = measure_latency(models, found.shape, given.batches, given.repeats, torch.device(device), threads)
    form = ", batch norms folded" if given.fold else ""
    lines = [f"{found.body['backbone']['name']} on {device}, {threads} threads, medians of {given.repeats}{form}", ""]
    lines += [
        "| batch | dense ms | pruned ms | dense images/s | pruned images/s | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for batch in map(str, given.batches):
        one, other = times["dense"][batch], times["pruned"][batch]
        lines.append(
            f"| {batch} | {one['ms']:.2f} | {other['ms']:.2f} | {one['images_per_s']:.1f} | "
            f"{other['images_per_s']:.1f} | {speedup_text(one, other)} |"
        )
    lines += _doubts(times, list(map(str, given.batches)))
    return "\n".join(lines), times, 0


def _doubts(times: dict[str, Any], batches: list[str]) -> list[str]:
    """A line for each time that is not reliable."""
    return [
        f"batch {batch}, {name}: {of[batch]['why']} (timed {of[batch]['rounds']} times over)"
        for batch in batches
        for name, of in times.items()
        if not of[batch]["reliable"]
    ]


def _push(given: argparse.Namespace) -> Answer:
    from dist_prune.export import bundle, formats, hub

    place = _folder(given.bundle)
    if place is None:
        raise PruneError(f"{given.bundle}: there is no such folder; name a run directory or its export folder")
    body = bundle.read_bundle(place).body  # a damaged bundle is not pushed
    extra = sorted(f.name for f in place.iterdir() if f.name.endswith(tuple(formats.SUFFIX.values())))
    text = hub.model_card(body, hub.report_of(place))
    files = (bundle.MANIFEST, bundle.WEIGHTS, *extra)
    where = hub.push(place, given.destination, files, text, given.private)
    return f"{where}: {', '.join((*files, hub.CARD))}", {"where": where, "files": [*files, hub.CARD]}, 0


def _within(option: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise PruneError(f"{option}: {value} is out of range; name 1 to {most:,}")


def _folder(name: str) -> Path | None:
    """The bundle's folder, or None where it is no folder here."""
    place = Path(name)
    place = place / "export" if (place / "export").is_dir() else place
    return place if place.is_dir() else None


def _images(given: argparse.Namespace, found: Any, place: Path | None, train: bool) -> Any:
    """(n, C, H, W) normalised images: those of ``--images``, or of the recipe that made the bundle ``found``."""
    import numpy as np
    import torch

    from dist_prune.data.datasets import FolderSource, open_source
    from dist_prune.data.folder_scan import find_images, left_out_text
    from dist_prune.data.loader import ImageLoader, TransformConfig
    from dist_prune.data.open_split import open_split

    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in found.body["image"].items()
        if key != "schedule"  # of training
    }
    transform, root = TransformConfig(**fields), Path(given.images).expanduser() if given.images else None
    backend = "auto"
    if root is not None and root.suffix == ".npz":
        source: Any = open_source("npz", str(root), "", train)
    elif root is not None:
        if not root.is_dir():
            raise PruneError(f"--images: there is no folder {root}")
        files, left = find_images(root)
        if not files:
            raise PruneError(f"--images: {root} holds no image files{left_out_text(left)}")
        if left and not train:
            print(f"{root}: {len(files):,} image files{left_out_text(left)}", file=sys.stderr)
        source = FolderSource(files, np.zeros(len(files), dtype=np.int64), ("any",), str(root))  # type: ignore[arg-type]
    elif place is not None and (place.parent / "recipe.yaml").is_file():
        data = loading.load(str(place.parent / "recipe.yaml"), [], methods.options_of).data
        split = data.train_split if train else data.eval_split
        opened = open_split(data.backend, data.source, data.root, split, train, layout=data.layout)
        source, backend = opened.source, opened.backend
    else:
        raise PruneError("the bundle lies in no run directory, so nobody knows its images; name some with --images")
    if source.in_chans != found.shape[0]:
        raise PruneError(f"--images: they have {source.in_chans} channels, the network takes {found.shape[0]}")
    _within("--count", given.count, 10**9)
    count = min(given.count, len(source.labels))
    ids = np.linspace(0, len(source.labels) - 1, count).astype(
        np.int64
    )  # from the whole set: folders are sorted by class
    loader = ImageLoader(source, transform, torch.device("cpu"), backend=backend, memory_format=torch.contiguous_format)
    return torch.cat([part.images for part in loader.batches(np.array_split(np.unique(ids), -(-count // 32)))])


ACTS = {"export": _export, "latency": _latency, "push": _push}
