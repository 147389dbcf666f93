"""Every form of a backbone's name: built, cut, described for a bundle that loads elsewhere; what is refused."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import dist_prune
from dist_prune import models
from dist_prune.errors import PruneError
from dist_prune.pruning.surgery.verified_trace import trace_groups

OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10, in_chans=3, width=8):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(in_chans, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))

def make(num_classes, width=4):
    return Net(num_classes, 3, width)

def wrong():
    return 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's, importable by name and by file."""
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_networks", None)


@pytest.fixture
def vit(tmp_path) -> Path:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "vit")
    body = {
        "size": {"height": 32, "width": 32},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 3,
    }
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(body))
    return tmp_path / "vit"


@pytest.fixture
def saved(tmp_path) -> Path:
    from timm.models import save_for_hf

    torch.manual_seed(2)
    model = timm.create_model("resnet10t", num_classes=7)
    save_for_hf(model, tmp_path / "saved", model_args={"num_classes": 7}, safe_serialization=True)
    return tmp_path / "saved"


def build_anywhere(name: str, classes: int, in_chans: int = 3, **kwargs) -> None:
    """The portable name builds the same tensors, and loads through a bundle."""
    first = models.create(name, classes, in_chans, False, kwargs)
    other, arguments = models.portable(name, kwargs)
    models.check_portable(other)
    again = models.create(other, classes, in_chans, False, arguments)
    assert {n: t.shape for n, t in first.state_dict().items()} == {n: t.shape for n, t in again.state_dict().items()}


def test_torchvision(tmp_path):
    model = models.create("torchvision:resnet18", 10, 3).eval()
    graph = trace_groups(model, torch.zeros(1, 3, 64, 64))
    assert len(graph.free) == 12
    assert models.image_config(model, 3)["mean"] == (0.485, 0.456, 0.406)
    assert models.pretrained_classes("torchvision:resnet18.IMAGENET1K_V1") == 1000
    assert models.create("torchvision:resnet18", 10, 1)(torch.zeros(2, 1, 64, 64)).shape == (2, 10)
    build_anywhere("torchvision:resnet18", 10)
    assert models.create("torchvision:googlenet", 10, 3).train()(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert "torchvision:resnet50" in models.list_names("torchvision:resn*")


def test_torchvision_s_weights_with_a_head_for_other_classes(tmp_path, monkeypatch):
    """The file lies where torchvision keeps it, so nothing is fetched."""
    import torchvision

    weights = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT
    torch.manual_seed(3)
    published = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_, **__: published)
    for name, classes in (("squeezenet1_1", 1000),):
        model = models.create(f"torchvision:{name}", classes, 3, pretrained=True)
        assert all(torch.equal(tensor, published[key]) for key, tensor in model.state_dict().items())
    other = models.create("torchvision:squeezenet1_1", 4, 3, pretrained=True).state_dict()
    assert [key for key in other if other[key].shape != published[key].shape] == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]
    assert torch.equal(other["features.0.weight"], published["features.0.weight"])


def test_transformers_from_a_folder(vit):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    name = f"transformers:{vit}"
    model = models.create(name, 5, 3, pretrained=True).eval()
    reference = transformers.ViTForImageClassification.from_pretrained(vit).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), reference(images).logits)
    assert set(model.state_dict()) == set(reference.state_dict()), "names of the weights are transformers' own"
    config = models.image_config(model, 3)
    assert (config["mean"], config["input_size"], config["interpolation"]) == ((0.1, 0.2, 0.3), (3, 32, 32), "bicubic")
    other = models.create(name, 9, 3, pretrained=True).state_dict()
    assert other["classifier.weight"].shape == (9, 32)
    key = "vit.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(other[key], reference.state_dict()[key])
    graph = trace_groups(model, torch.zeros(1, 3, 32, 32))
    assert [g.width for g in graph.free].count(48) == 2, "the MLPs of both blocks"
    build_anywhere(name, 5)
    assert models.create(
        "transformers:resnet",
        4,
        1,
        False,
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8},
    )


def test_a_folder_that_timm_saved(saved):
    name = f"local-dir:{saved}"
    model = models.create(name, 7, 3, pretrained=True)
    stored = load_file(saved / "model.safetensors")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in model.state_dict().items())
    assert models.portable(name, {}) == ("resnet10t", {"global_pool": "avg"}) and models.pretrained_classes(name) == 7
    assert models.create(name, 3, 3).num_classes == 3
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(PruneError, match="has no model.safetensors; other files of weights may run code"):
        models.create(name, 7, 3, pretrained=True)


def test_a_repository_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PruneError, match="hf-hub:timm/none cannot be read.*where there is a network"):
        models.check("hf-hub:timm/none", {})


@pytest.mark.parametrize("name", ["own_networks:Net", "./own_networks.py:Net"])
def test_a_module_or_file_of_the_user_s(own, name):
    model = models.create(name, 6, 1, False, {"width": 12})
    assert model.conv1.weight.shape == (12, 1, 3, 3) and model.head.out_features == 6
    assert models.portable(name, {"width": 12}) == (name, {"width": 12})
    assert models.source_files(name) == ([Path("own_networks.py")] if name.startswith(".") else [])
    assert models.create(name.replace("Net", "make"), 6, 3)(torch.zeros(2, 3, 8, 8)).shape == (2, 6)


def test_a_bundle_of_a_user_s_network_is_loaded_by_leave_alone(own):
    model = models.create("own_networks:Net", 4, 3, False, {}).eval()
    graph = dist_prune.trace(model, (3, 16, 16), protect=["conv2"])
    assert "named by backbone.protect 'conv2'" in graph.group("conv2").protected
    plan = dist_prune.select(dist_prune.score(model, graph, "l1"), graph, target={"channels": 0.5})
    small = dist_prune.prune(model, plan)
    dist_prune.save(small, plan, own / "bundle")
    with pytest.raises(PruneError, match="is not run because a file says so"):
        dist_prune.load(own / "bundle")
    images = torch.randn(2, 3, 16, 16)
    name = json.loads((own / "bundle" / "bundle.json").read_text())["backbone"]["name"]
    allowed = dist_prune.load(own / "bundle", allow=[name])
    assert torch.equal(allowed(images), small.eval()(images))
    with pytest.raises(PruneError, match="is not run because a file says so"):
        dist_prune.load(own / "bundle", allow=["own_networks:make"])


@pytest.mark.parametrize(
    "name", ["local-dir:/etc", "hf-hub:someone/net", "transformers:/etc", "transformers:some/repo"]
)
def test_a_bundle_names_neither_a_path_nor_a_repository(own, name):
    model = models.create("resnet20_cifar", 4, 3).eval()
    graph = dist_prune.trace(model, (3, 32, 32))
    plan = dist_prune.select(dist_prune.score(model, graph, "l1"), graph, target={"channels": 0.5})
    folder = dist_prune.save(dist_prune.prune(model, plan), plan, own / "bundle")
    body = json.loads((folder / "bundle.json").read_text())
    body["backbone"]["name"] = name
    (folder / "bundle.json").write_text(json.dumps(body))
    with pytest.raises(PruneError, match="may name neither a path nor a repository"):
        dist_prune.load(folder)


REFUSED = [
    ("torchvision:resnet81", {}, "no classifier, segmenter or detector 'resnet81'. Did you mean 'resnet18'"),
    ("torchvision:resnet50.IMAGENET1K_V9", {}, "has no weights 'IMAGENET1K_V9'"),
    ("torchvision:maskrcnn_resnet50_fpn", {}, "is not offered. Detectors are fasterrcnn_mobilenet_v3_large_320_fpn"),
    ("torchvision:ssd300_vgg16.COCO_V1", {}, "weights of detectors are not fetched"),
    ("torchvision:ssd300_vgg16", {"box_nms_thresh": 0.5}, "torchvision:ssd300_vgg16"),
    ("torchvision:resnet50", {"weights": "DEFAULT"}, "unexpected keyword argument 'weights'"),
    ("transformers:bert", {}, "cannot be read|no image classifier|transformers has no image"),
    ("transformers:vit", {"hiden_size": 3}, "unexpected field 'hiden_size' of ViTConfig. Did you mean 'hidden_size'"),
    ("local-dir:/nowhere", {}, "cannot be read"),
    ("own_networks:Nett", {}, "own_networks has no 'Nett'. Did you mean 'Net'"),
    ("own_network:Net", {}, "own_network cannot be imported"),
    ("./missing.py:Net", {}, "there is no file"),
    ("own_networks:Net", {"widht": 3}, "takes no argument 'widht'. Did you mean 'width'"),
    ("own_networks:OWN", {}, "own_networks has no 'OWN'"),
    ("own_networks:wrong", {}, "made a int, not a torch.nn.Module"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "message"), REFUSED, ids=[f"{n} {k}" for n, k, _ in REFUSED])
def test_what_is_refused(own, name, kwargs, message):
    with pytest.raises(PruneError, match=message.replace("(", r"\(").replace("?", r"\?")):
        models.create(name, 10, 3, False, kwargs)


def test_pretrained_where_there_is_none(own, vit):
    with pytest.raises(PruneError, match="takes no argument 'pretrained'"):
        models.create("own_networks:Net", 10, 3, pretrained=True)
    with pytest.raises(PruneError, match="is a model type, which has no weights"):
        models.create("transformers:vit", 10, 3, pretrained=True)
    torch.save(load_file(vit / "model.safetensors"), vit / "pytorch_model.bin")
    (vit / "model.safetensors").unlink()
    with pytest.raises(PruneError, match="has no .safetensors file; other files of weights may run code"):
        models.create(f"transformers:{vit}", 5, 3, pretrained=True)


def test_code_that_fails_when_it_is_imported(own):
    (own / "broken.py").write_text("raise RuntimeError('no GPU')")
    with pytest.raises(PruneError, match="broken.py cannot be imported: RuntimeError: no GPU"):
        models.create("./broken.py:Net", 10, 3)


def test_protect_globs_that_match_nothing(own):
    model = models.create("own_networks:Net", 4, 3)
    with pytest.raises(PruneError, match="backbone.protect: no layer is called 'conv7'. Did you mean 'conv2'"):
        dist_prune.trace(model, (3, 16, 16), protect=["conv7"])


def test_a_checkpoint_with_another_head_for_a_user_s_network(own, tmp_path):
    from dist_prune.config.data import Backbone
    from dist_prune.models.load_checkpoint import classifier_names, load_checkpoint

    model = models.create("own_networks:Net", 4, 3)
    assert classifier_names(model) == ("head.weight", "head.bias")
    section = Backbone(name="own_networks:Net", checkpoint=str(tmp_path / "w.safetensors"))
    other = models.create("own_networks:Net", 7, 3)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    why = load_checkpoint(model, tmp_path / "w.safetensors", section, 4, True, lambda text: None)
    assert "has 7 classes" in why and model.head.out_features == 4
    assert torch.equal(model.conv1.weight, other.conv1.weight)
