"""Weights of the dense network from a user's checkpoint, also if its head has another number of classes."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from dist_prune.config.data import Backbone
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.models.authors_names import authors_names, from_authors
from dist_prune.models.torchvision_networks import last_linear
from dist_prune.models.torchvision_segmenters import fit_auxiliary, head_layers
from dist_prune.models.torchvision_weights import translate_names
from dist_prune.models.towers import Tower


def load_checkpoint(
    model: nn.Module, path: Path, backbone: Backbone, classes: int, trains: bool, say: Callable[[str], None]
) -> str:
    """Load the weights of a user's checkpoint into a network, in place.

    Args:
        model: the dense backbone with ``classes`` outputs.
        path: the file, safetensors or torch.
        backbone: the recipe's section ``backbone`` (``checkpoint_key``, ``checkpoint_skip``).
        classes: number of classes of the data.
        trains: whether a training follows: a head of another number of classes keeps its initial values then.
        say: called with a line for each remark about the file.

    Returns:
        The reason why the head keeps its initial values, or "" if it was loaded.

    Raises:
        PruneError: the file cannot be read, would run code or does not match the network, or its head has another
            number of classes and no training follows.
    """
    tower, model = model, model.trunk if isinstance(model, Tower) else model
    wanted = model.state_dict()
    weights = read_named(path, backbone, wanted, say)
    if isinstance(tower, Tower):
        weights = tower.without_head(weights, path.name, say)
    weights, absent = fit_auxiliary(model, weights, path.name, trains, say)
    head = classifier_names(model)
    head_sizes = {name: weights[name].shape[0] for name in head if name in weights and weights[name].ndim}
    other = _other_head(head_sizes, {name: wanted[name].shape[0] for name in head_sizes}, classes)
    if other and not trains:
        where = ", ".join(sorted({name.rpartition(".")[0] for name in head}))
        raise PruneError(
            f"class count mismatch: the data has {classes} classes, the head {where!r} of {path} has {other}. "
            "Use the data set that the checkpoint was trained on, or set train.epochs: the head is made anew then, and "
            "the network trained from these weights"
        )
    new = head if trains and (other or not head_sizes) else ()
    tensor_files.load_strictly(model, weights, str(path), (*new, *absent))
    variances = [tensor for name, tensor in weights.items() if name.endswith("running_var")]
    if trains and variances and all(bool(((tensor - 1).abs() < 1e-3).all()) for tensor in variances):
        say(
            f"every batch norm of {path.name} has the variance 1: folded into its neighbours, or never trained. "
            "A training counts anew and changes what the network computes"
        )
    if not new:
        return ""
    return (
        f"that of {path.name} has {other}{'' if 'outputs' in other else ' classes'}"
        if other
        else f"{path.name} has none"
    )


def _other_head(found: Mapping[str, int], own: Mapping[str, int], classes: int) -> str:
    """The size of the first tensor of a checkpoint's head that does not fit the network's; empty if all fit.

    Args:
        found: name -> outputs in the checkpoint.
        own: the same of the network: the number of classes, or of a detector a number for each anchor.
        classes: number of classes of the data.
    """
    for name, count in found.items():
        if own[name] == classes or not classes:
            if count != classes:
                return str(count)
        elif count != own[name]:
            return f"{count} outputs in place of {own[name]}"
    return ""


def read_named(
    path: Path, backbone: Backbone, wanted: Mapping[str, Tensor], say: Callable[[str], None]
) -> Mapping[str, Tensor]:
    """Read a checkpoint under the network's names, also if torchvision or a paper's program names them otherwise.

    Args:
        path: the file, safetensors or torch.
        backbone: the recipe's section ``backbone``.
        wanted: state dict of the network.
        say: called with a line for each remark about the file.

    Returns:
        Name -> tensor, on the CPU; names that no table knows are the file's own.

    Raises:
        PruneError: as ``tensor_files.read_weights``.
    """
    known = [*wanted, *authors_names(backbone.name, wanted)]
    weights = tensor_files.read_weights(path, backbone.checkpoint_key, backbone.checkpoint_skip, known, say)
    return from_authors(translate_names(weights, wanted), wanted, backbone.name, say)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the classifier's tensors in a network's state dict; distilled networks have several classifiers."""
    get_classifier = getattr(model, "get_classifier", None)
    if not callable(get_classifier):  # a user's own network: its last linear layer
        get_classifier = partial(last_linear, model)
    classifier = head_layers(model) or get_classifier()
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    names = [name for name, module in model.named_modules() if any(module is head for head in heads)]
    return tuple(entry for entry in model.state_dict() if any(entry.startswith(f"{name}.") for name in names))
