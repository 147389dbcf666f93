"""A bundle goes out of the door: ONNX and torch.export files that answer alike without this package, hub, latency."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import dist_prune
from dist_prune.cli import export
from dist_prune.cli import main as cli
from dist_prune.errors import PruneError
from dist_prune.export import bundle, formats, hub
from tests.support import tiny
from tests.support.launch import environment


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory with a bundle, and the digits that it was made for as PNG files."""
    run = tmp_path_factory.mktemp("run")
    bench = tiny.bench(tiny.network())
    tiny.bundled(run / "export", bench)
    recipe = {
        "name": "r",
        "backbone": {"name": "resnet8p_cifar"},
        "data": {"source": "digits"},
        "method": {"name": "l1"},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "target": {"macs": 0.6}}))
    images = np.repeat(np.asarray(bench.loader.source.images[:9]), 3, 3)  # type: ignore[union-attr]
    (run / "png").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(run / "png" / f"{number}.png")
    return run


def act(*words: str):
    """What ``dist-prune`` answers to machines."""
    done = subprocess.run(
        [sys.executable, "-m", "dist_prune.cli", *words, "--json"], capture_output=True, text=True, check=False,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def altered(made, folder, change):
    """A copy of the bundle whose manifest ``change`` edits."""
    shutil.copytree(made / "export", folder)
    body = json.loads((folder / bundle.MANIFEST).read_text())
    change(body)
    (folder / bundle.MANIFEST).write_text(json.dumps(body))
    return folder


def test_a_bundle_knows_what_it_was_made_with(made, tmp_path):
    body = json.loads((made / "export" / bundle.MANIFEST).read_text())
    assert body["versions"]["timm"] and body["versions"]["torch"] == torch.__version__.split("+")[0]
    assert body["signature"] == {k: list(v.shape) for k, v in tiny.network().state_dict().items()}
    later = altered(made, tmp_path / "later", lambda body: body["versions"].update(timm="0.0.1"))
    assert dist_prune.load(later) is not None, "another version of the same network is no trouble"
    older = altered(made, tmp_path / "older", lambda body: [body.pop(key) for key in ("versions", "signature")])
    assert dist_prune.load(older) is not None, "bundles of earlier versions have neither"


def test_another_network_of_the_same_name_is_said(made, tmp_path):
    """As if timm had changed the network meanwhile: one layer wider, one renamed."""

    def change(body) -> None:
        body["versions"]["timm"] = "0.0.1"
        body["signature"]["conv1.weight"] = [32, 1, 3, 3]
        body["signature"]["stem.bias"] = body["signature"].pop("bn1.bias")

    folder = altered(made, tmp_path / "other", change)
    with pytest.raises(PruneError) as error:
        dist_prune.load(folder)
    said = str(error.value)
    assert "resnet8p_cifar is another network here than where this bundle was made (3 tensors differ" in said
    assert "conv1.weight: [32, 1, 3, 3] there, [16, 1, 3, 3] here" in said
    assert "stem.bias: [16] there, absent here" in said
    assert "timm 0.0.1 there" in said and "pip install timm==0.0.1 torch==" in said


def test_a_network_that_timm_has_no_more_names_the_version_that_had_it(made, tmp_path):
    folder = altered(made, tmp_path / "gone", lambda body: body["backbone"].update(name="resnet8p_cifarx"))
    with pytest.raises(PruneError, match=r"resnet8p_cifarx.* The bundle was made with timm \d"):
        dist_prune.load(folder)


ONNX_ALONE = """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = np.load(sys.argv[2])
np.save(sys.argv[3], session.run(None, {"images": images})[0])
facts = session.get_modelmeta().custom_metadata_map
assert facts["size"] == "8" and facts["classes"].split() == list("0123456789"), facts
assert (facts["crop"], facts["interpolation"]) == ("1.0", "bilinear"), facts
assert (facts["crop_mode"], facts["exif"], facts["mean"], facts["std"]) == ("center", "true", "[0.3]", "[0.4]"), facts
assert facts["opset"].isdigit(), facts
(images_in,) = session.get_inputs()
assert images_in.shape[0] == session.get_outputs()[0].shape[0] == "batch", images_in.shape
"""
PT2_ALONE = """
import sys, numpy as np, torch
network = torch.export.load(sys.argv[1]).module()
np.save(sys.argv[3], network(torch.from_numpy(np.load(sys.argv[2]))).detach().numpy())
"""


@pytest.mark.parametrize(
    ("kind", "script", "bound"),
    [("onnx", ONNX_ALONE, 1e-4), pytest.param("pt2", PT2_ALONE, 1e-5, marks=pytest.mark.slow)],
)
def test_files_answer_alike_in_a_process_without_this_package(made, tmp_path, kind, script, bound):
    found = act("export", str(made), "--format", kind, "--out", str(tmp_path), "--count", "40")
    assert found[kind]["images"] == 40 and found[kind]["same_class"] == 1.0
    assert found[kind]["difference"] <= bound
    images = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "in.npy", images)
    check = script + "assert not any(name.startswith(('dist_prune', 'timm')) for name in sys.modules)"
    words = (found[kind]["file"], str(tmp_path / "in.npy"), str(tmp_path / "out.npy"))
    subprocess.run([sys.executable, "-I", "-c", check, *words], check=True, cwd="/", env=environment())
    with torch.no_grad():
        wanted = dist_prune.load(made)(torch.from_numpy(images)).numpy()
    assert np.abs(np.load(tmp_path / "out.npy") - wanted).max() < bound * np.abs(wanted).max()


@pytest.mark.slow
def test_half_and_integer_files_are_smaller_and_nearly_alike(made, tmp_path):
    found = act("export", str(made), "--format", "onnx", "onnx-fp16", "onnx-int8", "--out", str(tmp_path))
    sizes = [found[kind]["bytes"] for kind in ("onnx", "onnx-fp16", "onnx-int8")]
    assert sizes == sorted(sizes, reverse=True)
    assert 0 < found["onnx-fp16"]["difference"] < 2e-2 < 1 and found["onnx-int8"]["same_class"] >= 0.9
    assert {file.name for file in tmp_path.iterdir()} == {
        "model.onnx",
        "model.fp16.onnx",
        "model.int8.onnx",
        "serve.py",
    }


def test_a_file_that_answers_otherwise_is_not_kept(made, tmp_path, monkeypatch):
    model = dist_prune.load(made)
    written = formats._WRITERS["pt2"]

    def altered(network, *rest):
        changed = dist_prune.load(made)
        with torch.no_grad():
            next(changed.parameters()).mul_(1.5)
        written(changed, *rest)

    monkeypatch.setitem(formats._WRITERS, "pt2", altered)
    with pytest.raises(PruneError, match="pt2: the file answers otherwise"):
        formats.write("pt2", model, torch.randn(3, 1, 8, 8), tmp_path / "model.pt2", {})
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_traced_is_named(tmp_path):
    class Fickle(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3)) if float(images.sum()) > 0 else images.amax((2, 3))

    with pytest.raises(PruneError, match="pt2: this network cannot be written so"):
        formats.write("pt2", Fickle(), torch.randn(3, 1, 8, 8), tmp_path / "model.pt2", {})


def test_images_are_the_runs_or_those_that_are_named(made, tmp_path, capsys):
    alone = tmp_path / "alone"
    shutil.copytree(made / "export", alone)
    assert cli.main(["export", str(alone), "--format", "pt2"]) == 2
    assert "name some with --images" in capsys.readouterr().err
    assert cli.main(["export", str(alone), "--format", "pt2", "--images", str(made / "png")]) == 2
    assert "they have 3 channels, the network takes 1" in capsys.readouterr().err
    hidden = tmp_path / "only" / ".ipynb_checkpoints"
    shutil.copytree(made / "png", hidden)
    (tmp_path / "only" / "notes.txt").touch()
    assert cli.main(["export", str(alone), "--format", "pt2", "--images", str(tmp_path / "only")]) == 2
    assert "holds no image files; left out: 1 .txt, 1 hidden" in capsys.readouterr().err
    assert cli.main(["export", str(alone), "--format", "pt2", "--images", str(tmp_path / "nowhere")]) == 2
    assert "--images: there is no folder" in capsys.readouterr().err
    assert cli.main(["export", str(alone), "--format", "pt2", "--images", str(alone)]) == 2
    assert "holds no image files" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:77", "gpu", "meta", "mps"])
def test_latency_on_a_device_that_is_not_here_is_a_sentence(made, capsys, device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has such a device")
    assert cli.main(["latency", str(made), "--device", device]) == 2
    said = capsys.readouterr().err
    assert f"--device: '{device}' cannot be used here; PyTorch has cpu" in said
    assert "Traceback" not in said and len(said.splitlines()) == 1


def test_latency_measures_dense_against_pruned(made, capsys):
    assert cli.main(["latency", str(made), "--batches", "1", "2", "--repeats", "2", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: sorted(times) for name, times in found.items()} == {"dense": ["1", "2"], "pruned": ["1", "2"]}
    assert all(part["ms"] > 0 and part["threads"] == 1 for times in found.values() for part in times.values())


def test_a_folded_bundle_answers_alike_and_is_measured(made, capsys):
    plain, folded = dist_prune.load(made), dist_prune.load(made, fold=True)
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in plain.modules())
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in folded.modules())
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(folded(images), plain(images), rtol=1e-4, atol=1e-4)
    words = ["latency", str(made), "--batches", "1", "--repeats", "1", "--threads", "1", "--fold"]
    assert cli.main(words) == 0
    assert "batch norms folded" in capsys.readouterr().out


def test_push_to_a_folder_and_load_again(made, tmp_path, capsys):
    there = tmp_path / "there"
    assert cli.main(["push", str(made), str(there)]) == 0
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(dist_prune.load(there)(images), dist_prune.load(made / "export")(images))
    text = (there / hub.CARD).read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "dist_prune" and "| top-1 | 90.00 % | - |" in text and "60.0%" in text
    (tmp_path / "file").write_text("x")
    assert cli.main(["push", str(made), str(tmp_path / "file")]) == 2
    damaged = tmp_path / "damaged"
    shutil.copytree(there, damaged)
    (damaged / bundle.WEIGHTS).write_bytes(b"x" * 99)
    assert cli.main(["push", str(damaged), str(tmp_path / "never")]) == 2
    assert not (tmp_path / "never").exists()


def test_load_from_the_hubs_cache_and_what_is_said_without(made, tmp_path):
    """huggingface_hub itself, offline: the repository lies in its cache as a download would leave it."""
    place = tmp_path / "hub" / "models--someone--small"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(made / "export", place / "snapshots" / ("0" * 40))
    code = (
        "import dist_prune, torch; print(float(dist_prune.load('someone/small')(torch.ones(1, 1, 8, 8)).sum()))\n"
        "try: dist_prune.load('someone/other')\nexcept dist_prune.errors.PruneError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import dist_prune.errors\n" + code], capture_output=True, text=True, check=True,
        env=environment(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub")),
    )  # fmt: skip
    value, said = done.stdout.split("\n", 1)
    with torch.no_grad():
        assert float(value) == pytest.approx(float(dist_prune.load(made)(torch.ones(1, 1, 8, 8)).sum()), abs=1e-4)
    assert "'someone/other' is no folder here" in said and "cannot be reached" in said


def test_names_of_formats_are_those_of_the_writers():
    assert set(export.KINDS) == set(formats.SUFFIX) == set(formats._WRITERS)
    assert all(re.fullmatch(r"\.[a-z0-9.]+", suffix) for suffix in formats.SUFFIX.values())


# what an unprepared machine has: no torch, and nothing that needs it
NO_TORCH = """
import runpy, sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "dist_prune"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Refused())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def photographs(folder):
    """Pictures of several shapes and modes, one turned by its EXIF orientation."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number, (height, width) in enumerate(((60, 80), (97, 41), (33, 90), (48, 48))):
        small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        picture = small.resize((width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 1 else 1
        picture.save(folder / f"{number}.png", exif=exif)
    Image.fromarray(rng.integers(0, 256, (40, 70), dtype=np.uint8)).save(folder / "grey.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    "image",
    [
        {"size": 32, "crop": 0.875, "interpolation": "bicubic"},
        {"size": [24, 40], "crop": 0.9, "interpolation": "bilinear"},
        {"size": 32, "crop": 1.0, "interpolation": "nearest", "crop_mode": "squash"},
        {"size": [40, 24], "crop": 0.95, "interpolation": "bilinear", "crop_mode": "border", "exif": False},
    ],
)
def test_serve_prepares_an_image_as_the_loader_does(image, tmp_path):
    """The same numbers as those of the evaluation loader, for each way to crop."""
    from dist_prune.data.datasets import FolderSource
    from dist_prune.data.loader import ImageLoader, TransformConfig
    from dist_prune.export import serve

    body = {"backbone": {"name": "n"}, "image": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], **image}}
    read = SimpleNamespace(body={**body, "classes": ["a"]}, plan=SimpleNamespace(fingerprint="p"))
    facts = export.file_metadata(read)
    files = photographs(tmp_path / "images")
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in body["image"].items()}
    source = FolderSource(files, np.zeros(len(files), dtype=np.int64), ("any",), str(tmp_path))
    loader = ImageLoader(source, TransformConfig(**fields), torch.device("cpu"), backend="torch")
    (batch,) = loader.batches([np.arange(len(files))])
    for file, wanted in zip(files, batch.images.numpy(), strict=True):
        np.testing.assert_allclose(serve.prepare(Image.open(file), facts)[0], wanted, atol=1e-5, err_msg=file.name)


def test_serve_classifies_where_torch_cannot_be_imported(made, tmp_path):
    out = tmp_path / "out"
    code = cli.main(["export", str(made), "--format", "onnx", "--out", str(out)])
    assert code == 0
    digits = tiny.bench(tiny.network()).loader.source.images[:3]  # type: ignore[union-attr]
    files = [str(tmp_path / f"{number}.png") for number in range(3)]
    for file, digit in zip(files, digits, strict=True):
        Image.fromarray(np.asarray(digit).squeeze()).save(file)
    done = subprocess.run(
        [sys.executable, "-I", "-c", NO_TORCH, str(out / "serve.py"), *files], capture_output=True, text=True,
        check=False, cwd="/", env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    image = json.loads((made / "export" / bundle.MANIFEST).read_text())["image"]
    pixels = torch.from_numpy(np.stack([np.asarray(digit).reshape(1, 8, 8) for digit in digits])).float() / 255
    with torch.no_grad():
        logits = dist_prune.load(made)((pixels - image["mean"][0]) / image["std"][0])
    for line, file, shares in zip(done.stdout.splitlines(), files, logits.softmax(1), strict=True):
        name, _, said = line.partition(": ")
        best, share = said.split(", ")[0].split()
        assert name == file and best == str(int(shares.argmax()))
        assert float(share) == pytest.approx(float(shares.max()), abs=1e-3)


@pytest.mark.parametrize("opset", [18, 21])
def test_the_operator_set_is_the_one_asked_for(made, tmp_path, opset, capsys):
    import onnx

    words = ["--format", "onnx", "--out", str(tmp_path), "--opset", str(opset), "--json", "--count", "4"]
    assert cli.main(["export", str(made), *words]) == 0
    assert json.loads(capsys.readouterr().out)["onnx"]["opset"] == opset
    body = onnx.load(tmp_path / "model.onnx")
    assert [entry.version for entry in body.opset_import if not entry.domain] == [opset]
    assert cli.main(["export", str(made), "--format", "onnx", "--opset", "99"]) == 2
    assert "--opset: 99 is out of range" in capsys.readouterr().err


def test_a_format_that_fails_does_not_hide_the_others(made, tmp_path, monkeypatch, capsys):
    """With what was written, what was not and why, and a serve.py of somebody else that stays."""

    def broken(*_):
        raise RuntimeError("no such operation")

    monkeypatch.setitem(formats._WRITERS, "pt2", broken)
    (tmp_path / "serve.py").write_text("mine")
    words = ["export", str(made), "--out", str(tmp_path), "--count", "4", "--format", "pt2", "onnx"]
    assert cli.main(words) == 2
    said = capsys.readouterr().out
    assert f"{tmp_path / 'model.onnx'}: " in said and "not written: pt2: this network cannot be written so" in said
    assert "another file of that name was there" in said and (tmp_path / "serve.py").read_text() == "mine"
    assert not (tmp_path / "model.pt2").exists()
    assert cli.main([*words, "--json"]) == 2
    body = json.loads(capsys.readouterr().out)
    assert "no such operation" in body["pt2"]["error"] and body["onnx"]["opset"]
    assert cli.main([*words[:-1]]) == 2
    assert "error: pt2: this network cannot be written so" in capsys.readouterr().err
