"""The rows of a layer's regression: what each of its outputs reads, and its error."""

from collections.abc import Iterator

from torch import Tensor, nn

from dist_prune.pruning.graph.window import Window

CHUNK = 2**19  # float64 entries of a piece: it stays in the processor's caches

Piece = tuple[slice, Tensor, Tensor]  # groups, (g, d, rows) inputs, (g, o, rows) errors


def table_sizes(module: nn.Module, block: slice = slice(None)) -> tuple[int, int, int]:
    """Groups, inputs of one output and outputs of one group of a convolution or linear layer.

    Args:
        module: the layer.
        block: the input channels that count.
    """
    if isinstance(module, nn.ConvTranspose2d):
        inputs = len(range(module.in_channels)[block]) // module.groups
        return module.groups, inputs * module.weight[0, 0].numel(), module.out_channels // module.groups
    if isinstance(module, nn.Conv2d):
        return module.groups, module.weight[0, block].numel(), module.out_channels // module.groups
    assert isinstance(module, nn.Linear)
    return 1, module.weight[0, block].numel(), module.out_features


def rows_of(module: nn.Module, x: Tensor, errors: Tensor, block: slice = slice(None)) -> Iterator[Piece]:
    """The rows of a regression, a row for each output position of each image.

    Args:
        module: a convolution, a transposed convolution or a linear layer.
        x: its input, (n, C, H, W), or (..., C) of a linear layer.
        errors: of its output's shape.
        block: input channels that are read.

    Yields:
        Groups of the layer, their inputs (g, d, rows) and errors (g, o, rows), float64. An input's place among the d is
        that in the weight: channel, then tap. The pieces depend on the shapes alone.
    """
    groups, inputs, outputs = table_sizes(module, block)
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        flat, flat_errors = x[..., block].reshape(-1, inputs), errors.reshape(-1, outputs)
        step = max(1, CHUNK // (inputs + outputs))
        for start in range(0, len(flat), step):
            pair = flat[start : start + step], flat_errors[start : start + step]
            own, wanted = (part.double().T[None] for part in pair)
            yield slice(0, 1), own, wanted
        return
    window = Window.of(module, x.shape[2:], errors.shape[2:])
    each = (inputs + outputs) * errors.shape[2:].numel()  # of one group and image
    together = max(1, min(groups, CHUNK // each))
    step = max(1, CHUNK // (each * together))
    width = module.in_channels // groups
    for first in range(0, groups, together):
        count = min(together, groups - first)
        channels = block if groups == 1 else slice(first * width, (first + count) * width)
        outs = slice(first * outputs, (first + count) * outputs)
        for start in range(0, len(x), step):
            images = slice(start, start + step)
            own = window.read(x[images, channels])  # (g C, taps, n, H, W)
            wanted = errors[images, outs].transpose(0, 1).double()
            yield slice(first, first + count), own.view(count, inputs, -1), wanted.reshape(count, outputs, -1)


def errors_alone(module: nn.Module, errors: Tensor) -> Iterator[Piece]:
    """The same without any inputs: (g, 0, rows), for the means of the errors.

    Args:
        module: the layer.
        errors: of its output's shape.
    """
    groups, _, outputs = table_sizes(module)
    if isinstance(module, nn.Linear):
        errors = errors.reshape(-1, outputs).T[:, :, None]
    else:
        errors = errors.flatten(2).transpose(0, 1)  # (g o, n, positions)
    step = max(1, CHUNK // (errors[:, 0].numel()))
    for start in range(0, errors.shape[1], step):
        wanted = errors[:, start : start + step].double().reshape(groups, outputs, -1)
        yield slice(0, groups), wanted[:, :0], wanted
