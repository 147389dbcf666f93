"""The library beyond classification: outputs of any form, masks, bundles that say what they hold."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import dist_prune as dp
from dist_prune.errors import PruneError
from dist_prune.export import bundle, formats, hub
from dist_prune.pruning.network_output import tensors_of
from dist_prune.pruning.plan.plan import Plan
from dist_prune.tasks.outputs import named_tensors
from tests.support import masks

SHAPE = (3, masks.SIDE, masks.SIDE)


@dataclass
class Output:
    """As transformers give their outputs."""

    hidden: Tensor
    logits: Tensor


class Objects(masks.Segmenter):
    def forward(self, images):
        found = super().forward(images)
        return Output(found["aux"], found["out"])


def network(form: str = "dict") -> masks.Segmenter:
    torch.manual_seed(0)
    return (Objects() if form == "object" else masks.Segmenter(form)).eval()


def batches(count: int = 3):
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(0, masks.CLASSES, (count, 4, masks.SIDE, masks.SIDE), generator=draw)
    labels[:, :, :2] = 255
    return [(torch.randn(4, *SHAPE, generator=draw), one) for one in labels]


def plan_with(form: str, loader) -> tuple[masks.Segmenter, Plan]:
    model = network(form)
    graph = dp.trace(model, SHAPE)
    scores = dp.score(model, graph, "taylor", loader, micro_batch=5, task="segmentation")
    return model, dp.select(scores, graph, target={"macs": 0.5})


@pytest.mark.parametrize("form", ["tensor", "dict", "tuple", "list", "object"])
def test_a_segmenter_is_pruned_saved_and_loaded_whatever_form_its_outputs_have(form, tmp_path):
    model, plan = plan_with(form, batches())
    small = dp.prune(model, plan)
    place = dp.save(small, plan, tmp_path / "b", classes=["road", "sky", "tree", "car"], task="segmentation")
    again = bundle.load(place, model=lambda: network(form))
    images = torch.randn(2, *SHAPE)
    with torch.no_grad():
        for one, other in zip(tensors_of(again(images)), tensors_of(small.eval()(images)), strict=True):
            assert torch.equal(one, other)
    body = bundle.read_bundle(place).body
    assert body["task"]["name"] == "segmentation"
    names = {
        "tensor": ["logits"],
        "dict": ["out", "aux"],
        "tuple": ["logits_0", "logits_1"],
        "list": ["logits_0", "logits_1"],
        "object": ["hidden", "logits"],
    }
    assert list(body["outputs"]) == names[form]
    card = hub.model_card(body, None)
    assert "pipeline_tag: image-segmentation" in card
    assert "mIoU" in card


def test_masks_of_one_channel_are_the_same_masks():
    """torchvision's transforms give masks (n, 1, H, W)."""
    _, plan = plan_with("dict", batches())
    _, other = plan_with("dict", [{"pixel_values": x, "labels": y[:, None]} for x, y in batches()])
    assert other.fingerprint == plan.fingerprint
    parts = [(x[i : i + 1], y[i : i + 1]) for x, y in batches() for i in range(4)]
    assert plan_with("dict", parts)[1].fingerprint == plan.fingerprint


@pytest.mark.parametrize(
    ("loader", "options", "text"),
    [
        ([x for x, _ in batches()], {}, r"needs labels, and the loader gives images alone"),
        ([(x, y[:, 0, 0]) for x, y in batches()], {}, r"expected are class numbers \(n, H, W\) int64"),
        ([(x, y.float()) for x, y in batches()], {}, r"labels are torch.float32 \(4, 16, 16\)"),
        (batches(), {"task": "segmentatio"}, r"unknown task .*segmentation"),
        (batches(), {"method": "hrel"}, r"method.name: hrel needs one class number for each image"),
    ],
)
def test_wrong_targets_are_refused(loader, options, text):
    model = network()
    graph = dp.trace(model, SHAPE)
    with pytest.raises(PruneError, match=text):
        dp.score(model, graph, **{"method": "taylor", "loader": loader, "task": "segmentation", **options})


def test_a_bundle_of_another_task_is_refused(tmp_path):
    model, plan = plan_with("dict", batches())
    with pytest.raises(PruneError, match=r"task: the network gives a dict with out \(2, 4, 16, 16\)"):
        dp.save(dp.prune(model, plan), plan, tmp_path)


def test_a_bundle_whose_outputs_were_altered_does_not_load(tmp_path):
    model, plan = plan_with("dict", batches())
    dp.save(dp.prune(model, plan), plan, tmp_path, task="segmentation")
    body = json.loads((tmp_path / bundle.MANIFEST).read_text())
    body["outputs"]["axu"] = body["outputs"].pop("aux")
    (tmp_path / bundle.MANIFEST).write_text(json.dumps(body))
    with pytest.raises(PruneError, match=r"do not fit one another: the network answers .*'aux'"):
        bundle.load(tmp_path, model=network)


def test_folded_norms_give_the_same_outputs(tmp_path):
    model, plan = plan_with("dict", batches())
    place = dp.save(dp.prune(model, plan), plan, tmp_path, task="segmentation")
    images = torch.randn(2, *SHAPE)
    with torch.no_grad():
        whole, folded = (bundle.load(place, model=network, fold=fold)(images) for fold in (False, True))
    assert torch.allclose(whole["out"], folded["out"], atol=1e-5)


@pytest.mark.parametrize("kind", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_files_have_named_outputs_the_main_one_first(kind, tmp_path):
    images = torch.cat([x for x, _ in batches()])
    for form, names in (("object", ["logits", "hidden"]), ("dict", ["out", "aux"])):
        file = tmp_path / f"{form}{formats.SUFFIX[kind]}"
        facts = formats.write(kind, network(form), images, file, {"a": "b"})
        assert facts["outputs"] == names
        assert facts["difference"] < 1e-4
        if kind == "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(str(file))
            assert [output.name for output in session.get_outputs()] == names
            (found,) = session.run([names[0]], {"images": images[:3].numpy()})
            assert np.asarray(found).shape == (3, masks.CLASSES, masks.SIDE, masks.SIDE)


FORMS = ("tensor", "tuple", "list", "dict", "object")
SLOW = [(kind, form) for kind in ("pt2", "onnx") for form in FORMS if (kind, form) != ("pt2", "dict")]


@pytest.mark.parametrize(("kind", "form"), [("pt2", "dict"), *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)])
def test_files_take_images_of_other_sizes_where_the_task_wants_it(kind, form, tmp_path):
    model, images = network(form), torch.randn(3, *SHAPE)
    file = tmp_path / f"model{formats.SUFFIX[kind]}"
    facts = formats.write(kind, model, images, file, {}, any_size=True)
    assert facts["any_size"]
    if kind == "onnx":
        import onnxruntime

        (images_in,) = onnxruntime.InferenceSession(str(file)).get_inputs()
        assert images_in.shape == ["batch", 3, "height", "width"]
    others = torch.randn(5, 3, masks.SIDE + 8, 2 * masks.SIDE - 4)
    with torch.no_grad():
        wanted = sorted(named_tensors(model(others), "logits"), key=lambda pair: facts["outputs"].index(pair[0]))
        found = formats.runner(kind, file)(others)
    found = (found,) if isinstance(found, Tensor) else found
    assert len(found) == len(facts["outputs"]) == len(wanted)
    for (_, one), other in zip(wanted, found, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_network_of_one_size_gets_a_file_of_one_size(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 2)).eval()
    facts = formats.write("pt2", model, torch.randn(3, 3, 8, 8), tmp_path / "model.pt2", {}, any_size=True)
    assert not facts["any_size"]
    assert facts["difference"] < 1e-5
