"""Names of layers in the papers' programs, beside those of this package's networks: one table for both directions.

Checkpoints with the authors' names are loaded under the names here, and ``dist-prune plan --names authors`` writes
theirs. The table names only layers that have another name there. The programs:

``graph``: redundancy-graph-decomposition. ``dirichlet``: Dirichlet_Pruning and dirichlet_pruning (the Shapley paper's).
``mint``: MINT; its file of ResNet-56 was not available, so its norms are taken to be numbered like those of its other
networks. ``entropy``: Interpretable-Deep-Model-Pruning.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dist_prune.models import googlenet_cifar, mobilenet_cifar, vgg_cifar

Pairs = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Names:
    """How one program names the layers of a network.

    Attributes:
        program: the paper's name here, as in ``recipes/``.
        pairs: makes (module path here, module path there) of every layer whose name differs.
        foreign: tensors of the program's file that its network does not compute with.
        without_bias: layers here that have no bias there.
    """

    program: str
    pairs: Callable[[], Pairs]
    foreign: tuple[str, ...] = ()
    without_bias: tuple[str, ...] = ()

    @property
    def theirs(self) -> dict[str, str]:
        """Module path here -> module path there."""
        return dict(self.pairs())


def names_of(backbone: str) -> tuple[Names, ...]:
    """The programs that name a network's layers in another way.

    Args:
        backbone: name of the network, as in a recipe; the tag of its weights is left out of account.
    """
    return NETWORKS.get(backbone.partition(".")[0], ())


def authors_names(backbone: str, wanted: Mapping[str, Tensor]) -> list[str]:
    """The names that the tensors of a network have in the papers' programs.

    Args:
        backbone: name of the network, as in a recipe.
        wanted: its state dict.
    """
    return [_rename(name, names.theirs) for names in names_of(backbone) for name in wanted]


def from_authors(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], backbone: str, say: Callable[[str], None]
) -> Mapping[str, Tensor]:
    """Rename the tensors of a paper's checkpoint as the network here names them; others are returned unchanged.

    Args:
        weights: name -> tensor of a checkpoint.
        wanted: state dict of the network.
        backbone: name of the network, as in a recipe.
        say: called with a line if names were changed.
    """
    best, found = weights, sum(name in wanted for name in weights)
    for names in names_of(backbone):
        ours = {theirs: here for here, theirs in names.theirs.items()}
        renamed = {_rename(name, ours): tensor for name, tensor in weights.items() if name not in names.foreign}
        for layer in names.without_bias:
            if f"{layer}.weight" in renamed and f"{layer}.bias" not in renamed:
                renamed[f"{layer}.bias"] = torch.zeros_like(renamed[f"{layer}.weight"][:, 0])
        count = sum(name in wanted for name in renamed)
        if len(renamed) >= len(weights) - len(names.foreign) and count > found:
            best, found = renamed, count
            said = f"checkpoint: its names are those of the authors' program of {names.program}; taken by the table"
            say(said + "".join(f"; {layer} has no bias there: zeros" for layer in names.without_bias))
    return best


def _rename(name: str, layers: Mapping[str, str]) -> str:
    """A tensor's name with its layer's other name."""
    layer, _, kind = name.rpartition(".")
    return f"{layers[layer]}.{kind}" if layer in layers else name


def _vgg_graph() -> Pairs:
    """Theirs are numbered by a list of layers in which a pool is an entry, too."""
    here = entry = 0
    for stage, (_, count) in enumerate(vgg_cifar.STAGES):
        if stage:
            here, entry = here + 1, entry + 1
        for _ in range(count):
            yield f"features.{here}", f"features.conv{entry}"
            yield f"features.{here + 1}", f"features.norm{entry}"
            here, entry = here + 3, entry + 1
    yield from {
        "hidden.0": "classifier.linear1", "hidden.1": "classifier.norm", "head": "classifier.linear2",
    }.items()  # fmt: skip


def _vgg_numbered(conv: str, tail: Mapping[str, str]) -> Pairs:
    """Convolutions ``<conv>1`` to ``<conv>13`` and norms ``bn1`` to ``bn13``, then the linear layers."""
    here, number = 0, 0
    for stage, (_, count) in enumerate(vgg_cifar.STAGES):
        here += bool(stage)
        for _ in range(count):
            number += 1
            yield f"features.{here}", f"{conv}{number}"
            yield f"features.{here + 1}", f"bn{number}"
            here += 3
    yield from tail.items()


def _googlenet_graph() -> Pairs:
    """Their branches are flat lists: convolution, norm, ReLU; b4 begins with a pool."""
    yield from {"stem.0": "pre_layers.0", "stem.1": "pre_layers.1"}.items()
    for block in googlenet_cifar.WIDTHS:
        here, there = f"blocks.{block}", f"inception_{block}"
        yield from ((f"{here}.b1.{i}", f"{there}.b1.{i}") for i in (0, 1))
        for branch, convs, shift in (("b2", 2, 0), ("b3", 3, 0), ("b4", 1, 1)):
            for conv in range(convs):
                for i in (0, 1):
                    yield f"{here}.{branch}.{conv + shift}.{i}", f"{there}.{branch}.{3 * conv + shift + i}"


def _mobilenetv1_graph() -> Pairs:
    yield from {"stem.0": "model.0.0", "stem.1": "model.0.1"}.items()
    for block in range(len(mobilenet_cifar.V1)):
        yield from ((f"blocks.{block}.{i}", f"model.{block + 1}.{i}") for i in (0, 1, 3, 4))


def _mobilenetv2_graph() -> Pairs:
    yield from {"stem.0": "conv1", "stem.1": "bn1", "last.0": "conv2", "last.1": "bn2"}.items()
    strides = [first if i == 0 else 1 for _, _, count, first in mobilenet_cifar.V2 for i in range(count)]
    for block, stride in enumerate(strides):
        for number, part in enumerate(("expand", "depthwise", "project"), start=1):
            yield f"blocks.{block}.{part}.0", f"layers.{block}.conv{number}"
            yield f"blocks.{block}.{part}.1", f"layers.{block}.bn{number}"
        if stride == 1:
            yield from ((f"blocks.{block}.shortcut.{i}", f"layers.{block}.shortcut.{i}") for i in (0, 1))


def _resnet56_mint(blocks: int = 9) -> Pairs:
    """All convolutions are numbered through; the last layer is ``linear1``."""
    number = 1
    for stage in (1, 2, 3):
        for block in range(blocks):
            for i in (1, 2):
                number += 1
                yield f"layer{stage}.{block}.conv{i}", f"conv{number}"
                yield f"layer{stage}.{block}.bn{i}", f"bn{number}"
    yield "linear", "linear1"


def _resnet50_mint() -> Pairs:
    """All convolutions are numbered through; a projection shortcut comes after its block's third one."""
    number = 1
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            here = f"layer{stage}.{block}"
            layers = [(f"{here}.conv{i}", f"{here}.bn{i}") for i in (1, 2, 3)]
            layers += [(f"{here}.downsample.0", f"{here}.downsample.1")] * (block == 0)
            for conv, norm in layers:
                number += 1
                yield from ((conv, f"conv{number}"), (norm, f"bn{number}"))
    yield "fc", "linear1"


def _plain(**layers: str) -> Callable[[], Pairs]:
    return lambda: iter(layers.items())


_RESNET = Names("graph", _plain(conv1="conv", bn1="bn", linear="fc"))
_HEAD3, _HEAD4 = (Names("entropy", _plain(head=f"fc{number}")) for number in (3, 4))
NETWORKS: dict[str, tuple[Names, ...]] = {
    "vgg16_bn_cifar": (Names("graph", _vgg_graph),),
    **{f"resnet{depth}p_cifar": (_RESNET,) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "googlenet_cifar": (Names("graph", _googlenet_graph),),
    "mobilenetv1_cifar": (Names("graph", _mobilenetv1_graph),),
    "mobilenetv2_cifar": (Names("graph", _mobilenetv2_graph),),
    "lenet5_mnist": (Names("dirichlet", _plain(conv1="c1", conv2="c3", fc1="c5", fc2="f6", fc3="out7")),),
    "vgg16_bn_linear_cifar": (
        Names("dirichlet", partial(_vgg_numbered, "c", {"hidden.0": "l1", "head": "l3"}), foreign=("parameter",)),
    ),
    "vgg16_bn_maxpool_cifar": (
        Names(
            "mint", partial(_vgg_numbered, "conv", {"hidden.0": "linear1", "hidden.1": "bn14", "head": "linear3"})
        ),
    ),
    "resnet56_cifar": (Names("mint", _resnet56_mint),),
    "resnet50": (Names("mint", _resnet50_mint),),
    "resnet18": (Names("entropy", _plain(), without_bias=("fc",)),),
    "lenet6_16": (_HEAD4,),
    "lenet20_50_800_500": (_HEAD3,),
    "lenet20_50_128_64": (_HEAD3,),
    **{f"vgg{depth}_fc_cifar": (_HEAD3,) for depth in (8, 11, 13, 16, 19)},
}  # fmt: skip
