"""Networks of dense outputs: torchvision's by name, and the U-Net on timm's encoders."""

import pytest
import torch

import dist_prune
import dist_prune as dp
from dist_prune import models
from dist_prune.errors import PruneError

SEGMENTERS = {
    "lraspp_mobilenet_v3_large": {}, "deeplabv3_mobilenet_v3_large": {"aux_loss": True},
    "fcn_resnet50": {"aux_loss": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmenter_of_torchvision_is_cut_to_half(name, tmp_path):
    def make():
        torch.manual_seed(0)
        return models.create(f"torchvision:{name}", 4, 3, kwargs=SEGMENTERS[name])

    model = make().eval()
    graph = dp.trace(model, (3, 64, 64))
    assert {group.protected for group in graph.groups} == {"", "its channels are the network's outputs"}
    masks = torch.randint(0, 4, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    scores = dp.score(model, graph, "taylor", [(torch.randn(2, 3, 64, 64), masks)], task="segmentation")
    plan = dp.select(scores, graph, target={"macs": 0.5}, max_ratio=0.9)
    small = dp.prune(model, plan).train()
    outputs = small(torch.randn(2, 3, 64, 64))
    assert outputs.keys() == ({"out", "aux"} if SEGMENTERS[name] else {"out"})
    assert all(tensor.shape == (2, 4, 64, 64) for tensor in outputs.values())
    place = dp.save(small, plan, tmp_path, task="segmentation")
    again = dist_prune.load(place, model=make)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(image)["out"], small.eval()(image)["out"])


@pytest.mark.parametrize(
    ("name", "channels", "arguments", "text"),
    [
        ("torchvision:lraspp_mobilenet_v3_larg", 3, {}, r"Did you mean 'lraspp_mobilenet_v3_large'"),
        ("torchvision:lraspp_mobilenet_v3_large", 1, {}, r"takes images of 3 channels, the data has 1"),
        ("torchvision:fcn_resnet50", 3, {"aux_los": True}, r"backbone.kwargs: unexpected keyword argument 'aux_los'"),
        ("torchvision:fcn_resnet50", 3, {"weights": "DEFAULT"}, r"unexpected keyword argument 'weights'"),
        ("torchvision:fcn_resnet50.DEFAULT", 3, {}, r"weights of segmenters are not fetched. Write torchvision:fcn_re"),
        ("unet", 3, {"encoder": "resnet19"}, r"the encoder 'resnet19' is no network of timm"),
        ("unet", 3, {"encoder": "lenet"}, r"lenet"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(name, channels, arguments, text):
    with pytest.raises(PruneError, match=text):
        models.create(name, 4, channels, kwargs=arguments)


def test_weights_of_a_segmenter_are_named_by_a_file():
    with pytest.raises(PruneError, match=r"backbone.pretrained: weights of torchvision.s segmenters are not fetched"):
        models.create("torchvision:fcn_resnet50", 10, 3, pretrained=True)


@pytest.mark.parametrize("side", [32, 50])
def test_a_u_net_gives_logits_of_the_size_of_the_image(side):
    """50 is no multiple of the stride: the maps of the encoder are rounded up."""
    model = models.create("unet", 5, 3, kwargs={"encoder": "mobilenetv3_small_050", "width": 4}).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, side, side + 6)).shape == (2, 5, side, side + 6)
    config = models.image_config(model, 3)
    assert config["mean"] == (0.485, 0.456, 0.406)
