"""Annotation files of boxes: ``boxfolder`` (ROOT/boxes.json) and ``coco`` (files in the form of COCO's instances)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_prune.data.box_source import AnnotatedImage, BoxSource, make_source
from dist_prune.data.folder_scan import IMAGE_FILES
from dist_prune.data.random_access import SplitSpec
from dist_prune.errors import PruneError, abbreviate, nearest, shown

BOXES = "boxes.json"
EXPECTED_FORM = {
    "boxfolder": 'boxfolder: ROOT/train/images/<name>.jpg, the same for ROOT/val, and ROOT/boxes.json: {"classes": '
    '["car"], "boxes": {"train/<name>": [[class number, x0, y0, x1, y1], ...]}} in pixels, an empty list for an image '
    "without boxes (data.train_split and data.eval_split name other sub-folders)",
    "coco": "coco: ROOT/annotations/instances_<split>.json, ROOT/annotations/<split>.json, ROOT/<split>.json or "
    "ROOT/<split>/_annotations.coco.json with images, annotations (bbox: x, y, width, height in pixels) and "
    "categories; the images in ROOT/<split>, ROOT/images/<split> or ROOT/<split>/images (data.train_split and "
    "data.eval_split name the splits, for example train2017)",
}


def open_boxes(spec: SplitSpec) -> BoxSource:
    """Open a split of ``boxfolder``.

    Raises:
        PruneError: folders or the annotation file are missing or malformed, or see ``make_source``.
    """
    root = spec.path(EXPECTED_FORM["boxfolder"])
    folder = _image_folder([root / spec.split / "images", root / spec.split], spec, root, "boxfolder")
    file = root / BOXES
    body = _body(file, "boxfolder", {"classes": list, "boxes": dict})
    names = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(IMAGE_FILES))
    if not names:
        raise PruneError(f"data.root: {folder} holds no image files")
    known = {key: value for key, value in body["boxes"].items() if key.startswith(f"{spec.split}/")}
    images, used = [], set()
    for name in names:
        key = next((key for key in (f"{spec.split}/{Path(name).stem}", f"{spec.split}/{name}") if key in known), None)
        if key is not None:
            used.add(key)
            images.append(AnnotatedImage(folder / name, tuple(_rows(known[key], key, file))))
    without = [name for name in names if not {f"{spec.split}/{Path(name).stem}", f"{spec.split}/{name}"} & used]
    if without:
        raise PruneError(
            f"data.root: {len(without)} of {len(names)} images in {folder} are not in {file}: "
            f"{abbreviate(without, 4)}. An image without boxes has an empty list there"
        )
    if extra := sorted(known.keys() - used):
        raise PruneError(f"data.root: {file} names images that are not in {folder}: {abbreviate(extra, 4)}")
    return make_source(images, _names(body["classes"], file), file, spec.say)


def open_coco(spec: SplitSpec) -> BoxSource:
    """Open a split of ``coco``. Category ids become class numbers in ascending order.

    Raises:
        PruneError: folders or the annotation file are missing or malformed, or see ``make_source``.
    """
    root, split = spec.path(EXPECTED_FORM["coco"]), spec.split
    file = _annotations(root, split)
    if not file.is_file():
        key = "data.train_split" if spec.train else "data.eval_split"
        raise PruneError(f"{key}: there is no {file} or the like. {EXPECTED_FORM['coco']}")
    places = [root / split, root / "images" / split, root / split / "images"]
    if file.parent.name == split:
        places.insert(0, file.parent)
    body = _body(file, "coco", {"images": list, "annotations": list, "categories": list})
    categories = sorted(_entries(body["categories"], "categories", file, id=int, name=str), key=lambda one: one["id"])
    number = {category["id"]: place for place, category in enumerate(categories)}
    listed = _entries(body["images"], "images", file, id=int, file_name=str)
    boxes: dict[int, list[tuple[float, ...]]] = {image["id"]: [] for image in listed}
    for entry in _entries(body["annotations"], "annotations", file, image_id=int, category_id=int, bbox=list):
        if entry["image_id"] not in boxes:
            raise PruneError(
                f"data.root: {file}: an annotation is of the image {entry['image_id']}, which it does not list"
            )
        if entry["category_id"] not in number:
            raise PruneError(
                f"data.root: {file}: an annotation has the category {entry['category_id']}, which it does not list"
            )
        left, top, width, height = _numbers(entry["bbox"], 4, f"bbox of image {entry['image_id']}", file)
        row = (number[entry["category_id"]], left, top, left + width, top + height, float(bool(entry.get("iscrowd"))))
        boxes[entry["image_id"]].append(row)
    first = listed[0]["file_name"] if listed else ""
    folder = next((place for place in places if (place / first).is_file()), None)
    if folder is None:
        tried = ", ".join(map(str, places))
        raise PruneError(f"data.root: {file} names the image {shown(first)}, which is in none of {tried}")
    images = [
        AnnotatedImage(folder / _inside(image["file_name"], file), tuple(boxes[image["id"]]), _stated_size(image))
        for image in listed
    ]
    return make_source(images, [category["name"] for category in categories], file, spec.say)


def class_count(source: str, root: str | None, split: str) -> int | None:
    """Number of classes of an annotation file; None if there is none.

    Raises:
        PruneError: the file is malformed.
    """
    folder = Path(root).expanduser() if root else None
    if folder is None:
        return None
    file = folder / BOXES if source == "boxfolder" else _annotations(folder, split)
    if not file.is_file():
        return None
    key = "classes" if source == "boxfolder" else "categories"
    return len(_body(file, source, {key: list})[key])


def _annotations(root: Path, split: str) -> Path:
    """The annotation file of a COCO split, or the first place where one may be."""
    folder = root / "annotations"
    places = [folder / f"instances_{split}.json", folder / f"{split}.json", root / f"{split}.json"]
    places.append(root / split / "_annotations.coco.json")
    return next((place for place in places if place.is_file()), places[0])


def _image_folder(places: list[Path], spec: SplitSpec, root: Path, form: str) -> Path:
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        key = "data.train_split" if spec.train else "data.eval_split"
        found = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise PruneError(
            f"{key}: there is no folder {places[0]}.{nearest(spec.split, found)} Folders: "
            f"{abbreviate(found) or 'none'}. {EXPECTED_FORM[form]}"
        )
    return folder


def _body(file: Path, form: str, keys: Mapping[str, type]) -> dict[str, Any]:
    """The mapping in a JSON file with lists or mappings of some keys."""
    if not file.is_file():
        raise PruneError(f"data.root: there is no {file}. {EXPECTED_FORM[form]}")
    if not file.stat().st_size:
        raise PruneError(f"data.root: the annotation file {file} is empty. {EXPECTED_FORM[form]}")
    try:
        body = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise PruneError(f"data.root: {file} cannot be read as JSON: {error}. {EXPECTED_FORM[form]}") from error
    for key, kind in keys.items():
        value = body.get(key) if isinstance(body, dict) else None
        if not isinstance(value, kind):
            what = "a list" if kind is list else "a mapping"
            raise PruneError(f"data.root: {file} has no {key} ({what}). {EXPECTED_FORM[form]}")
        if not value:
            raise PruneError(
                f"data.root: {file} has an empty {key}, so there is nothing to learn. {EXPECTED_FORM[form]}"
            )
    return body


def _names(values: list[Any], file: Path) -> list[str]:
    wrong = [value for value in values if not isinstance(value, str) or not value]
    if wrong:
        raise PruneError(f"data.root: {file}: the class {shown(wrong[0])} is no name")
    return values


def _rows(value: Any, key: str, file: Path) -> list[tuple[float, ...]]:
    if not isinstance(value, list):
        raise PruneError(f"data.root: {file}: {key} has {shown(value)}, not a list of boxes")
    return [(*_numbers(row, 5, f"a box of {key}", file), 0.0) for row in value]


def _numbers(value: Any, count: int, what: str, file: Path) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count or not all(type(one) in (int, float) for one in value):
        raise PruneError(f"data.root: {file}: {what} is {shown(value)}, not {count} numbers")
    return tuple(map(float, value))


def _entries(values: list[Any], key: str, file: Path, **fields: type) -> list[dict[str, Any]]:
    for value in values:
        for name, kind in fields.items():
            if not isinstance(value, dict) or type(value.get(name)) is not kind:
                raise PruneError(
                    f"data.root: {file}: an entry of {key} has no {name} ({kind.__name__}): {shown(value)}"
                )
    return values


def _inside(name: str, file: Path) -> str:
    """A file name that stays below the images' folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise PruneError(f"data.root: {file}: the image {shown(name)} lies outside of the images' folder")
    return name


def _stated_size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    return (width, height) if type(width) is int and type(height) is int else None
