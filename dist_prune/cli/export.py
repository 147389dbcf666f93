"""``dist-prune export``: a bundle as ONNX or torch.export files, checked on real images."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dist_prune import methods
from dist_prune.cli.verb import Answer, bundle_folder, check_range
from dist_prune.config import loading
from dist_prune.errors import PruneError
from dist_prune.fileio import write_atomic

SERVER = "serve.py"
KINDS = ("onnx", "onnx-fp16", "onnx-int8", "pt2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("bundle", help="a run directory, its export folder, or owner/name on the hub")
    parser.add_argument(
        "--format", nargs="+", choices=KINDS, default=["onnx", "pt2"], help="formats to write (default: onnx pt2)"
    )
    parser.add_argument("--opset", type=int, help="ONNX operator set of the files (default: torch's)")
    parser.add_argument("--out", help="folder for the files (default: the bundle's own)")
    parser.add_argument("--images", help="image folder or .npz file to check on (default: the run's evaluation images)")
    parser.add_argument(
        "--count", type=int, default=64, help="number of images to check on, and to calibrate int8 with (default: 64)"
    )


# Functions import the giants themselves: timm and its kin take seconds, and most verbs need none of them.


def run(arguments: argparse.Namespace) -> Answer:
    """Write each format and compare its answers with the network's; a format that fails does not hide the others.

    Raises:
        PruneError: if the bundle cannot be read, there are no images, or no format could be written.
    """
    from dist_prune.export import bundle, formats
    from dist_prune.training.tracking import Tracker

    if arguments.opset is not None:
        check_range("--opset", arguments.opset, formats.newest_opset())
    read = bundle.read_bundle(arguments.bundle)
    folder = bundle_folder(arguments.bundle)
    if arguments.out is None and folder is None:
        raise PruneError(f"--out: {arguments.bundle} is on the hub; name a folder for the files")
    out = Path(arguments.out) if arguments.out else folder
    assert out is not None
    out.mkdir(parents=True, exist_ok=True)
    model = read.small()
    if why := getattr(model, "why_not_exported", ""):
        raise PruneError(f"{read.body['backbone']['name']} cannot be written as a file: {why}")
    images = _images(arguments, read, folder, False)
    calibration = _images(arguments, read, folder, True) if "onnx-int8" in arguments.format else None
    metadata = file_metadata(read)
    any_size = bool((read.body.get("task") or {}).get("any_size"))
    lines: list[str] = []
    body: dict[str, Any] = {}
    failed: dict[str, PruneError] = {}
    kinds = list(dict.fromkeys(arguments.format))
    for kind in Tracker(True).bar(kinds, len(kinds), "export"):
        file = out / f"model{formats.SUFFIX[kind]}"
        try:
            written = formats.write(kind, model, images, file, metadata, calibration, any_size, arguments.opset)
        except PruneError as error:
            failed[kind], body[kind] = error, {"error": str(error)}
            continue
        facts = {"file": str(file), **written}
        body[kind] = facts
        what = "outputs" if read.body.get("task") else "logits"
        lines.append(
            f"{file}: {facts['bytes'] / 2**20:.2f} MiB; on {facts['images']} images {what} differ by at most "
            f"{facts['difference']:.1e} of the largest"
            + ("" if read.body.get("task") else f", {facts['same_class']:.1%} get the same class")
            + ("" if facts["outputs"] == ["logits"] else f"; outputs {', '.join(facts['outputs'])}")
            + (f"; images of {'any size' if facts['any_size'] else 'this size alone'}" if any_size else "")
            + (f"; opset {facts['opset']}" if "opset" in facts else "")
        )
    if failed and not lines:
        raise PruneError("\n".join(map(str, failed.values())))
    if not read.body.get("task") and any("opset" in facts for facts in body.values()):
        lines.append(_write_server(out))
    lines += [f"not written: {error}" for error in failed.values()]
    return "\n".join(lines), body, 2 if failed else 0


def file_metadata(read: Any) -> dict[str, str]:
    """The metadata of a bundle's files: everything that a program needs to prepare an image and to name its class.

    Args:
        read: the bundle.

    Returns:
        Name -> text. ``classes`` has a line for each class; numbers, lists and truth values are JSON.
    """
    from dist_prune.export.manifest import Image

    image = {name: read.body["image"].get(name, field.default) for name, field in Image.model_fields.items()}
    return {
        "backbone": read.body["backbone"]["name"],
        "plan": read.plan.fingerprint,
        **{name: json.dumps(image[name]) for name in ("mean", "std", "size", "crop", "exif")},
        **{name: image[name] for name in ("interpolation", "crop_mode")},
        "classes": "\n".join(" ".join(name.split("\n")) for name in read.body["classes"]),
    }


def _write_server(out: Path) -> str:
    """Copy the program that classifies images with an ONNX file beside it; a file of that name is left as it is."""
    file, text = out / SERVER, (Path(__file__).parents[1] / "export" / SERVER).read_text()
    if file.exists() and file.read_text(errors="replace") != text:
        return f"{file}: another file of that name was there and was left as it is"
    write_atomic(file, text)
    return f"{file}: python {file} IMAGE names its class, with onnxruntime, numpy and Pillow alone"


def _images(arguments: argparse.Namespace, read: Any, folder: Path | None, train: bool) -> Any:
    """Normalised images of ``--images``, or of the recipe that made the bundle.

    Args:
        arguments: the verb's parsed command line.
        read: the bundle.
        folder: its folder, if it is on this machine.
        train: take training images (to calibrate) instead of evaluation images.

    Returns:
        float32 of shape (n, C, H, W); n is at most ``--count``.
    """
    import numpy as np
    import torch

    from dist_prune.data.loader import ImageLoader, TransformConfig

    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in read.body["image"].items()
        if key != "schedule"  # it belongs to training
    }
    source, backend = _source(arguments, folder, train)
    if source.in_chans != read.shape[0]:
        raise PruneError(f"--images: they have {source.in_chans} channels, the network takes {read.shape[0]}")
    check_range("--count", arguments.count, 10**9)
    count = min(arguments.count, len(source.labels))
    # from the whole set: folders are sorted by class
    ids = np.unique(np.linspace(0, len(source.labels) - 1, count).astype(np.int64))
    loader = ImageLoader(
        source,
        TransformConfig(**fields),
        torch.device("cpu"),
        backend=backend,
        memory_format=torch.contiguous_format,
    )
    return torch.cat([batch.images for batch in loader.batches(np.array_split(ids, -(-count // 32)))])


def _source(arguments: argparse.Namespace, folder: Path | None, train: bool) -> tuple[Any, str]:
    """The source of ``--images`` or of the bundle's run, and the backend that loads it."""
    import numpy as np

    from dist_prune.data.datasets import OPENERS, DatasetKeys, FolderSource, open_source
    from dist_prune.data.folder_scan import find_images, left_out_text
    from dist_prune.data.open_split import open_split

    root = Path(arguments.images).expanduser() if arguments.images else None
    if root is not None and root.suffix == ".npz":
        return open_source("npz", str(root), "", train), "auto"
    if root is not None:
        if not root.is_dir():
            raise PruneError(f"--images: there is no folder {root}")
        files, left_out = find_images(root)
        if not files:
            raise PruneError(f"--images: {root} holds no image files{left_out_text(left_out)}")
        if left_out and not train:
            print(f"{root}: {len(files):,} image files{left_out_text(left_out)}", file=sys.stderr)
        labels = np.zeros(len(files), dtype=np.int64)
        return FolderSource(files, labels, ("any",), str(root)), "auto"  # type: ignore[arg-type]
    if folder is not None and (folder.parent / "recipe.yaml").is_file():
        data = loading.load(str(folder.parent / "recipe.yaml"), [], methods.options_of).data
        if data.source not in OPENERS:  # beside a bundle from elsewhere the recipe may be anyone's
            raise PruneError(
                f"the run's images are the Dataset {data.source}, whose code export does not run; name images with "
                "--images"
            )
        split = data.train_split if train else data.eval_split
        opened = open_split(
            data.backend, data.source, data.root, split, train, layout=data.layout, dataset=DatasetKeys.of(data)
        )
        return opened.source, opened.backend
    raise PruneError("the bundle is in no run directory, so its images are not known; name some with --images")
