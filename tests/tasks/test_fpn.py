"""A feature pyramid on an encoder of timm: lateral sums and nearest upsampling are traced, scored and cut."""

from collections import OrderedDict

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FeaturePyramidNetwork

import dist_prune as dp
from dist_prune.pruning.hooks.gating import gate_off
from tests.support import masks


class Pyramid(nn.Module):
    """timm's maps, torchvision's pyramid, the sum of its maps at the largest size, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3))
        self.pyramid = FeaturePyramidNetwork(self.encoder.feature_info.channels(), 16)  # type: ignore[union-attr]
        self.mix, self.head = nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, masks.CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pyramid(OrderedDict((str(n), one) for n, one in enumerate(self.encoder(images))))
        size = maps["0"].shape[-2:]
        whole = sum(functional.interpolate(one, size, mode="nearest") for one in maps.values())
        logits = self.head(functional.relu(self.mix(whole)))
        return functional.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


def test_a_pyramid_is_cut_to_what_its_gated_network_computes():
    model, side = Pyramid().double().eval(), 32
    labels = torch.randint(0, masks.CLASSES, (2, side, side))
    images = torch.randn(2, 3, side, side)
    graph = dp.trace(model, (3, side, side))
    free = {group.name: set(group.producers) for group in graph.free}
    lateral = next(layers for layers in free.values() if "pyramid.inner_blocks.0.0" in layers)
    assert {"pyramid.inner_blocks.1.0", "pyramid.inner_blocks.2.0"} <= lateral  # a sum: one decision for all
    assert any("pyramid.layer_blocks.0.0" in layers for layers in free.values())
    scores = dp.score(model, graph, "taylor", [(images, labels)], task="segmentation")
    plan = dp.select(scores, graph, target={"macs": 0.5})
    small = dp.prune(model, plan).eval()
    kept = {name: layer for name, layer in small.named_modules() if isinstance(layer, nn.Conv2d)}
    assert kept["pyramid.inner_blocks.0.0"].out_channels == kept["pyramid.inner_blocks.2.0"].out_channels
    assert dp.costs(graph, plan)["macs"] <= 0.5 * dp.costs(graph)["macs"]
    with torch.no_grad(), gate_off(model, graph, plan.removed):
        assert torch.allclose(small(images.double()), model(images.double()), atol=1e-9)
