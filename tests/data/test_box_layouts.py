"""Both layouts of boxes give the same source; what is wrong in an annotation file is said before work."""

import json

import numpy as np
import pytest
from PIL import Image

from dist_prune.data.box_layouts import class_count, open_boxes, open_coco
from dist_prune.data.random_access import SplitSpec, target_kind
from dist_prune.errors import PruneError
from tests.support import boxes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def coco(root, split="val"):
    return open_coco(SplitSpec("coco", str(root), split, False))


def test_both_layouts_give_the_same_boxes(tmp_path):
    own = boxes.source(boxes.write(tmp_path / "own"), train=False)
    boxes.write_coco(tmp_path / "coco", tmp_path / "own")
    other = coco(tmp_path / "coco")
    assert target_kind(own) == target_kind(other) == "boxes"
    assert own.classes == other.classes == boxes.CLASSES  # categories 3 and 7, listed the other way round
    assert np.array_equal(own.targets, other.targets)
    assert np.array_equal(own.sizes, other.sizes)
    assert own.sizes[0].tolist() == [boxes.WIDTH, boxes.HEIGHT]
    assert (own.targets[0, :, 0] == -1).all()  # the first image has no box
    assert own.targets.shape == (boxes.IMAGES, 3, 6)
    assert [
        class_count("boxfolder", str(tmp_path / "own"), "train"),
        class_count("coco", str(tmp_path / "coco"), "val"),
    ]
    assert class_count("coco", str(tmp_path / "nowhere"), "val") is None


@pytest.mark.parametrize("place", ["annotations/val.json", "val.json", "val/_annotations.coco.json"])
def test_an_annotation_file_lies_at_one_of_these_places(tmp_path, place):
    boxes.write(tmp_path / "own")
    boxes.write_coco(tmp_path / "coco", tmp_path / "own")
    (tmp_path / "coco/annotations/instances_val.json").rename(tmp_path / "coco" / place)
    assert len(coco(tmp_path / "coco").files) == boxes.IMAGES


def test_the_identity_follows_the_boxes_and_sizes_are_read_once(tmp_path):
    root, said = boxes.write(tmp_path / "own"), []
    spec = SplitSpec("boxfolder", str(root), "train", True, said.append)
    first, second = open_boxes(spec), open_boxes(spec)
    assert first.identity == second.identity
    assert said == [f"data: the sizes of {boxes.IMAGES} images are read (once)"]
    body = json.loads((root / "boxes.json").read_text())
    body["boxes"]["train/001"][0][1] += 1
    (root / "boxes.json").write_text(json.dumps(body))
    assert open_boxes(spec).identity != first.identity


def broken(change):
    """The message of a boxfolder whose boxes.json was changed."""

    def message(root):
        body = json.loads((root / "boxes.json").read_text())
        (root / "boxes.json").write_text(text if isinstance(text := change(body), str) else json.dumps(body))
        with pytest.raises(PruneError) as error:
            boxes.source(root)
        return str(error.value)

    return message


def put(row):
    return broken(lambda body: body["boxes"]["train/001"].__setitem__(0, row))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (put([0, 10, 5, 50, 20]), "001.png: the box 10, 5, 50, 20 (x0, y0, x1, y1) lies outside of its image of 48x40"),
        (put([0, -3, 5, 20, 20]), "lies outside of its image of 48x40 pixels"),
        (put([2, 1, 1, 9, 9]), "has the class 2, and class numbers are 0 to 1"),
        (put([0, 9, 1, 3, 9]), "ends before it begins"),
        (put([0, 1, 1, 9]), "a box of train/001 is [0, 1, 1, 9], not 5 numbers"),
        (put([0, "a", 1, 9, 9]), "not 5 numbers"),
        (broken(lambda body: " "), "cannot be read as JSON"),
        (broken(lambda body: "{}"), "has no classes (a list)"),
        (broken(lambda body: body.update(classes=[])), "has an empty classes"),
        (broken(lambda body: body.update(classes=["car", "car"])), "car stands there twice"),
        (broken(lambda body: body["boxes"].pop("train/003")), "1 of 11 images in"),
        (broken(lambda body: body["boxes"].update({"train/x": []})), "names images that are not in"),
        (broken(lambda body: [rows.clear() for rows in body["boxes"].values()]), "has no box in any of the 11"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_work(tmp_path, message, text):
    assert text in message(boxes.write(tmp_path / "own"))


def test_an_empty_annotation_file_is_refused(tmp_path):
    root = boxes.write(tmp_path / "own")
    (root / "boxes.json").write_text("")
    with pytest.raises(PruneError, match=r"the annotation file .* is empty\. boxfolder: ROOT/train/images"):
        boxes.source(root)
    (root / "boxes.json").unlink()
    with pytest.raises(PruneError, match=r"there is no .*boxes\.json"):
        boxes.source(root)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda body: body["images"][2].update(width=99), "002.png has 48x40 pixels, instances_val.json says 99x40"),
        (lambda body: body["annotations"][0].update(category_id=4), "has the category 4, which it does not list"),
        (lambda body: body["annotations"][0].update(image_id=4), "is of the image 4, which it does not list"),
        (lambda body: body["annotations"][0].update(bbox=[40, 30, 20, 5]), "lies outside of its image of 48x40 pixels"),
        (lambda body: body["annotations"].clear(), "has an empty annotations"),
        (lambda body: body["images"][1].update(file_name="../x.png"), "lies outside of the images' folder"),
        (lambda body: body["images"][1].update(file_name="x.png"), "x.png: there is no such file"),
        (lambda body: body["images"][1].pop("id"), "an entry of images has no id (int)"),
    ],
)
def test_what_is_wrong_in_a_coco_file_is_said_before_work(tmp_path, change, text):
    boxes.write(tmp_path / "own")
    body = boxes.write_coco(tmp_path / "coco", tmp_path / "own")
    change(body)
    (tmp_path / "coco/annotations/instances_val.json").write_text(json.dumps(body))
    with pytest.raises(PruneError) as error:
        coco(tmp_path / "coco")
    assert text in str(error.value)


def test_crowds_are_kept_and_boxes_without_area_are_left_out(tmp_path):
    boxes.write(tmp_path / "own")
    body = boxes.write_coco(tmp_path / "coco", tmp_path / "own")
    body["annotations"][0] |= {"bbox": [5.5, 4.25, 0, 9], "category_id": 3}
    body["annotations"][1] |= {"bbox": [20, 10, 28.5, 12], "category_id": 7, "iscrowd": 1}  # half a pixel outside
    (tmp_path / "coco/annotations/instances_val.json").write_text(json.dumps(body))
    found = coco(tmp_path / "coco")
    assert (
        found.note
        == "1 boxes without area were left out; 1 boxes that reached less than 1 pixel over the edge were cut there"
    )
    assert (found.targets[1, :, 0] == -1).all()
    assert found.targets[2, 0].tolist() == [1, 20, 10, 48, 22, 1]


def test_an_image_that_is_none_is_named(tmp_path):
    root = boxes.write(tmp_path / "own")
    (root / "train/images/004.png").write_bytes(b"no image")
    with pytest.raises(PruneError, match=r"004\.png: cannot identify image file"):
        boxes.source(root)


def test_camvid_has_these_boxes(data):
    found = boxes.source(data / "camvid")
    assert found.classes == ("Car", "Pedestrian", "Bicyclist")
    assert int((found.targets[..., 0] >= 0).sum()) == 1457
    test = open_boxes(SplitSpec("boxfolder", str(data / "camvid"), "test", False))
    assert len(test.files) == 233
    assert int((test.targets[..., 0] >= 0).sum()) == 629
    with Image.open(test.fetch(0)) as image:
        assert list(image.size) == test.sizes[0].tolist() == [240, 180]
