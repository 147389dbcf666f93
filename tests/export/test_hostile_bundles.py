"""Bundles, plans and checkpoints that were damaged, or made to do harm: a network that works, or a sentence."""

import copy
import json
import random
import re
import resource
import shutil
import struct
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

import dist_prune
from dist_prune import models
from dist_prune.cli import main as cli
from dist_prune.cli.prune import bundle_section
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.export import bundle
from dist_prune.models import model_kwargs
from dist_prune.models.meta_shapes import meta_shapes, state_shapes
from dist_prune.pruning.plan.plan import Plan
from tests.support import tiny
from tests.test_layers import ROOT

WILD: list[Any] = [
    None, True, -1, 0, 1, 2**40, 10**400, 1.5, "", "x", "0", [], {}, [1], [[]], {"a": 1}, [None],
    "resnet18", "a" * 5000, "../../etc/passwd", [2**40], {"x": [0]}, [-1, 0], [0, 0],
]  # fmt: skip
OLD_TIMM = tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31)  # some networks read tensors as they are made
PLACES = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_strict")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny.bundled(tmp_path_factory.mktemp("bundle") / "good")


@pytest.fixture
def place(good, tmp_path):
    return shutil.copytree(good, tmp_path / "bundle")


class Trap:
    """What a pickle runs as it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def refused(folder: Path) -> str:
    with pytest.raises(PruneError) as error:
        dist_prune.load(folder)
    return str(error.value)


def rewritten(folder: Path, **changes: Any) -> None:
    file = folder / bundle.MANIFEST
    body = json.loads(file.read_text())
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = body
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    file.write_text(json.dumps(body))


@pytest.mark.parametrize("key", PLACES)
def test_a_bundle_names_no_file_and_runs_no_code(place, key):
    """The pickle lies beside the bundle, as one that is downloaded would have it."""
    torch.save(Trap(place / "ran"), place / "trap.pth")
    value = {"file": str(place / "trap.pth")} if key.startswith("pretrained_cfg") else str(place / "trap.pth")
    rewritten(place, backbone__kwargs={"img_size": 8, key: value})
    assert "unexpected keyword argument" in refused(place) and not (place / "ran").exists()


def test_verbs_that_start_from_a_bundle_run_no_code_that_it_names(place, capsys):
    payload = place / "payload.py"
    payload.write_text(f"import pathlib\npathlib.Path({str(place / 'ran')!r}).touch()\n")
    rewritten(place, backbone__name=f"{payload}:make")
    assert cli.main(["finetune", str(place), "--recipe", "quickstart"]) == 2
    assert "not run because a file says so" in capsys.readouterr().err
    with pytest.raises(PruneError, match="not run because a file says so"):
        bundle_section(place)  # of dist-prune prune
    assert bundle_section(place, f"{payload}:make")["name"] == f"{payload}:make", "the user's own recipe names it"
    assert not (place / "ran").exists()


@pytest.mark.parametrize("key", PLACES)
def test_neither_does_a_recipe(tmp_path, capsys, key):
    torch.save(Trap(tmp_path / "ran"), tmp_path / "trap.pth")
    assert cli.main(["check", "quickstart", f"backbone.kwargs.{key}={tmp_path / 'trap.pth'}"]) == 2
    said = capsys.readouterr().err
    assert f"unexpected keyword argument '{key}'" in said and "files, URLs and configs are never taken" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", ["checkpoint_path", "file"])
def test_timm_itself_unpickles_nothing(tmp_path, way):
    """The lowest timm that is allowed as well (make test-lowest): a second wall behind the first."""
    torch.save(Trap(tmp_path / "ran"), tmp_path / "trap.pth")
    trap: dict[str, Any] = {"checkpoint_path": str(tmp_path / "trap.pth")}
    if way == "file":
        trap = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "trap.pth")}}
    with pytest.raises(RuntimeError, match="weights_only"):
        timm.create_model("resnet10t", **trap)
    assert not (tmp_path / "ran").exists()


def test_the_lowest_versions_are_those_of_the_project():
    bounds = dict(re.findall(r'^  "([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.M))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-lowest.txt").read_text(), re.M))
    pins = {name.lower().replace("_", "-"): pin for name, pin in pins.items()}
    tested = {"torch", "torchvision"}
    for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name = name.partition(">=")[0]
        if name not in tested:
            pin = pins[name.lower().replace("_", "-")]
            assert re.fullmatch(re.escape(bounds[name]) + r"(\.0)*", pin), (name, bounds[name], pin)


def test_no_network_takes_what_names_a_place():
    """Over all of timm: some arguments are found for each, and none of timm's own that name files or configs."""
    banned = ("_path", "url", "cfg_overlay", "cache", "file", "hub", "checkpoint_p", "state_dict", "repo")
    bare = []
    for name in models.list_names():
        known = model_kwargs.allowed(name)
        assert not known & {*PLACES, *model_kwargs.NEVER}, name
        assert not [word for word in known if any(part in word for part in banned) and "drop_path" not in word], name
        if not known and not timm.model_entrypoint(name).__module__.startswith("dist_prune"):
            bare.append(name)
    assert not bare


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"drop_rate": 0.1, "act_layer": "silu"}), ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
        ("deit_tiny_distilled_patch16_224", {"drop_rate": 0.1}), ("regnetx_002", {"drop_path_rate": 0.1}),
        ("resnet50_stem3", {"drop_rate": 0.1}), ("efficientnet_b0", {"drop_path_rate": 0.1}),
    ],
)  # fmt: skip
def test_honest_arguments_reach_the_network(name, kwargs):
    """And looking at its outline first draws no random number."""
    torch.manual_seed(5)
    found = models.create(name, 10, 3, False, kwargs)
    torch.manual_seed(5)
    wanted = timm.create_model(name, num_classes=10, in_chans=3, **kwargs)
    assert all(
        torch.equal(a, b) for a, b in zip(found.state_dict().values(), wanted.state_dict().values(), strict=True)
    )
    assert meta_shapes(lambda: wanted) == state_shapes(wanted)
    seen = models.state_shapes(name, 10, 3, kwargs)
    assert seen == state_shapes(wanted) or (seen is None and OLD_TIMM)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"depth": 50_000, "embed_dim": 60_000}, "absurdly large"), ({"img_size": 60_000}, "a network of 2,705"),
        ({"depth": 10**9}, "too large"), ({"depth": "many"}, "could not be built"),
        ({"norm_layer": "a/b"}, "no name of"),
        ({"depth": float("inf")}, "too large"), ({"img_size": [[[[[[1]]]]]]}, "lists inside"),
        ({"pos_embed": {}}, "neither"),
        ({"img_sise": 8}, "Did you mean 'img_size'"), ({"num_classes": 3}, "unexpected keyword argument"),
    ],
)  # fmt: skip
def test_arguments_that_no_network_can_have(kwargs, said):
    with pytest.raises(PruneError, match=said):
        models.create("vit_tiny_patch16_224", 10, 3, False, kwargs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone__name": "local-dir:/tmp"}, "neither a path"), ({"backbone__name": 5}, "backbone.name"),
        ({"backbone__num_classes": 10**6, "classes": ["x"] * 10**6}, "the plan leaves 1000000 channels"),
        ({"backbone__num_classes": "10"}, "backbone.num_classes"), ({"backbone__in_chans": 0}, "backbone.in_chans"),
        ({"image__size": 2**40}, "image.size"), ({"image__mean": [None]}, "image.mean.0"),
        ({"classes": None}, "classes"),
        ({"plan__widths": {"conv1": 10**12}}, "no width or channel"),
        ({"plan__widths__conv1": 0}, "no width or channel"),
        ({"plan__widths__conv1": "16"}, "no width or channel"), ({"weights_digest": 7}, "weights_digest"),
        ({"figures": {"dense": {"macs": "many"}}}, "figures.dense.macs"), ({"origin": {"seed": 1}}, "recipe"),
        ({"image__std": [0]}, "image.std.0"), ({"image__crop": -1}, "image.crop"),
        ({"format": 10**400}, "about 401 digits"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_fields_of_another_type_or_size(place, changes, said):
    rewritten(place, **changes)
    text = refused(place)
    assert said in text and len(text) < 3000


def test_a_giant_is_not_built_for_tiny_weights(place):
    """Dense network of a billion values: named by the bundle, never allocated."""
    name = "vit_giant_patch14_dinov2"
    weights = {key: torch.zeros([1] * len(shape)) for key, shape in (models.state_shapes(name, 10, 3) or {}).items()}
    tensor_files.save_tensors(place / bundle.WEIGHTS, weights)
    digest = bundle.weights_digest(weights)
    rewritten(
        place, backbone__name=name, backbone__kwargs={}, backbone__in_chans=3, image__mean=[0.0] * 3,
        image__std=[1.0] * 3, plan={"format": 1, "removed": {}, "widths": {}}, weights_digest=digest,
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "no pruning removes so much" in refused(place)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"[" * 100_000, "nested too deeply"), (b'{"a":' * 100_000, "nested too deeply"), (b"\xff\xfe", "damaged"),
        (b"", "damaged"), (b"5", "no mapping"), (b'{"format": NaN}', "NaN is not JSON"), (b"9" * 5000, "damaged"),
    ],
)  # fmt: skip
def test_texts_that_are_no_json(place, raw, said):
    (place / bundle.MANIFEST).write_bytes(raw)
    assert said in refused(place)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}, {"a": {"dtype": "F32", "shape": [4]}},
        {"a": {"dtype": "F31", "shape": [4], "data_offsets": [0, 16]}}, {"__metadata__": {"meta": "[" * 10**5}},
        {"a": {"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}}, {"__metadata__": {"meta": "5"}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, {"__metadata__": 5}, [], None,
        {"a": {"dtype": "F8_E8M0", "shape": [16], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 16]}},
    ],
    ids=lambda header: str(header)[:60],
)  # fmt: skip
def test_absurd_headers_of_weights(place, header):
    text = json.dumps(header).encode()
    (place / bundle.WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused(place)


@pytest.mark.parametrize("raw", [b"", b"\0" * 8, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2) + b"{}"])
def test_weights_that_are_none(place, raw):
    (place / bundle.WEIGHTS).write_bytes(raw)
    refused(place)


def damaged(
    draw: random.Random, whole: dict[str, Any], raw: dict[str, bytes], tensors: dict[str, torch.Tensor]
) -> dict[str, bytes]:
    """The files of a bundle with one fault in them: its manifest, its files, its weights."""
    files, kind = dict(raw), draw.randrange(5)
    if kind == 0:  # one value of the manifest, somewhere
        body = copy.deepcopy(whole)
        spots = _spots(body)
        node, key = spots[draw.randrange(len(spots))]
        if draw.random() < 0.2 and isinstance(node, dict):
            del node[key]
        else:
            node[key] = draw.choice(WILD)
        if draw.random() < 0.7:
            body["plan"].pop("fingerprint", None) if isinstance(body.get("plan"), dict) else None
        files[bundle.MANIFEST] = json.dumps(body).encode()
    elif kind == 1:  # weights of other shapes and kinds, with the digest that belongs to them
        changed = dict(tensors)
        name = draw.choice(list(changed))
        old = changed[name] if changed[name].dim() else torch.ones(1)
        changed[name] = draw.choice([
            old[:0], torch.cat([old, old]) , old.unsqueeze(0), old.to(torch.int8), old.bool(),
            old[:1], torch.zeros(()), torch.zeros(1, 1, 1, 1), old.double(), old.half(),
            old * float("nan"),
        ])  # fmt: skip
        if draw.random() < 0.3:
            changed.pop(draw.choice(list(changed)))
        body = {**whole, "weights_digest": bundle.weights_digest(changed)}
        plain = {key: value.contiguous() for key, value in changed.items()}
        files = {bundle.MANIFEST: json.dumps(body).encode(), bundle.WEIGHTS: safetensors.torch.save(plain)}
    else:  # a flipped bit, a cut, a piece twice
        name = draw.choice(list(files))
        data = bytearray(files[name])
        spot = draw.randrange(min(len(data), 4000) if draw.random() < 0.5 else len(data))
        if kind == 2:
            data[spot] ^= 1 << draw.randrange(8)
        elif kind == 3:
            del data[spot:]
        else:
            data[spot:spot] = data[: draw.randrange(1, 200)]
        files[name] = bytes(data)
    return files


def answered(folder: Path, files: dict[str, bytes]) -> bool:
    """Whether such a bundle is taken; then it must answer images."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        model = dist_prune.load(folder)
    except PruneError as error:
        assert len(str(error)) < 10_000
        return False
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    return True


def whole_bundle(good: Path) -> tuple[dict[str, Any], dict[str, bytes], dict[str, torch.Tensor]]:
    """What ``damaged`` starts from."""
    raw = {name: (good / name).read_bytes() for name in (bundle.MANIFEST, bundle.WEIGHTS)}
    return json.loads(raw[bundle.MANIFEST]), raw, safetensors.torch.load(raw[bundle.WEIGHTS])


def fuzz(good: Path, folder: Path, count: int) -> int:
    """Load damaged copies of a bundle; how many were refused."""
    start, draw = whole_bundle(good), random.Random(3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = sum(answered(folder, damaged(draw, *start)) for _ in range(count))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200
    return count - taken


def _spots(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    pairs = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
    return [
        spot
        for key, inner in pairs
        for spot in [(node, key), *(_spots(inner) if isinstance(inner, dict | list) else [])]
    ]


def test_damaged_bundles_load_or_are_refused_in_a_sentence(good, tmp_path):
    assert 150 < fuzz(good, tmp_path, 300) < 300


@pytest.mark.slow
def test_three_thousand_damaged_bundles(good, tmp_path):
    assert 1500 < fuzz(good, tmp_path, 3000) < 3000


@pytest.mark.parametrize("value", WILD, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("key", ["format", "removed", "widths", "blocks", "reasons", "fingerprint"])
def test_plans_of_other_types(value, key):
    body = {"format": 1, "removed": {"a": [0]}, "widths": {"a": 4}, key: value}
    try:
        plan = Plan.from_dict(body)
    except PruneError:
        return
    assert isinstance(plan.fingerprint, str) and plan.counts is not None


def test_foreign_checkpoints_that_are_no_weights(tmp_path, capsys):
    bomb = tmp_path / "bomb.pth"
    torch.save({"w": torch.zeros(4)}, tmp_path / "small.pth")
    with zipfile.ZipFile(tmp_path / "small.pth") as small, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as big:
        for member in small.infolist():
            big.writestr(member.filename, bytes(100_000_000) if "data/0" in member.filename else small.read(member))
    cases = {
        "integer keys": {0: torch.zeros(2)}, "meta": {"w": torch.empty(4, device="meta")}, "text": {"w": "x"},
        "expanded": {"w": torch.zeros(1).expand(10**12)}, "sparse": {"w": torch.eye(3).to_sparse()}, "bytes": b"x",
        "quantized": {"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
    }  # fmt: skip
    for name, state in cases.items():
        torch.save(state, tmp_path / f"{name}.pth")
        assert (
            cli.main(["import-checkpoint", str(tmp_path / f"{name}.pth"), "--out", str(tmp_path / "x.safetensors")])
            == 2
        )
        assert "backbone.checkpoint" in capsys.readouterr().err, name
    assert cli.main(["import-checkpoint", str(bomb), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "many times its size" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
