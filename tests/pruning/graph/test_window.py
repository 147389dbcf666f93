"""What the taps of a convolution read, against torch's own convolutions."""

import pytest
import torch
from torch import nn

from dist_prune.pruning.graph.window import Window

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "stride": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=2),
    "dilated, stride, uneven": lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(0, 1), dilation=(2, 1)),
    "same": lambda: nn.Conv2d(3, 4, 4, padding="same"),
    "reflect": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "pointwise, stride": lambda: nn.Conv2d(3, 4, 1, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 2, stride=2),
    "transposed, overlap": lambda: nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1),
    "transposed, output padding": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
    "transposed, dilated": lambda: nn.ConvTranspose2d(3, 4, (3, 2), stride=(1, 3), padding=(1, 0), dilation=(2, 3)),
    "transposed, much cut": lambda: nn.ConvTranspose2d(3, 4, 2, stride=3, padding=3),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_weights_times_what_they_read_are_the_outputs(name):
    torch.manual_seed(0)
    module = CONVOLUTIONS[name]().double()
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    with torch.no_grad():
        y = module(x)
        window = Window.of(module, x.shape[2:], y.shape[2:])
        assert window.output(x.shape[2:]) == tuple(y.shape[2:])
        weight = module.weight.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else module.weight
        found = torch.einsum("oct,ctnhw->nohw", weight.flatten(2), window.read(x))
        assert torch.allclose(found + module.bias.view(-1, 1, 1), y, atol=1e-12)


def test_a_class_that_pads_by_itself_is_read_as_it_pads():
    class Same(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))

    module = Same(3, 4, 3, stride=2).double()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    y = module(x)
    found = torch.einsum("oct,ctnhw->nohw", module.weight.flatten(2), Window.of(module, (8, 8), y.shape[2:]).read(x))
    assert module.bias is not None
    assert torch.allclose(found + module.bias.view(-1, 1, 1), y, atol=1e-12)


def test_a_layer_of_a_traced_network_knows_its_window():
    from dist_prune.pruning.graph.layer_trace import trace_layers

    model = nn.Sequential(nn.Conv2d(1, 3, 3, dilation=2), nn.ConvTranspose2d(3, 2, 2, stride=2), nn.Flatten())
    layers = trace_layers(model, torch.zeros(1, 1, 8, 8))
    assert layers["0"].window == Window((3, 3), (1, 1), (2, 2))
    assert layers["1"].window == Window((2, 2), (2, 2), transposed=True)
