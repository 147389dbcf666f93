"""The dense network's weights from a file: read, named as the network names them, fitted; a head of other classes."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from dist_prune.config.data import Backbone
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.models.torchvision_weights import translate_names


def load_checkpoint(
    model: nn.Module, place: Path, spec: Backbone, classes: int, trains: bool, say: Callable[[str], None]
) -> str:
    """Load the weights of ``place`` into ``model``.

    Args:
        model: the dense backbone with ``classes`` outputs.
        spec: the recipe's section, which says what of the file is taken.
        trains: whether a training follows: a head of other classes stays new then.
        say: told what a person should know of the file.

    Returns:
        Why the head was left new, or nothing where it was loaded.

    Raises:
        PruneError: the file cannot be read, would run code, does not fit, or its head has other classes and no training
            follows.
    """
    wanted = model.state_dict()
    weights = tensor_files.read_weights(place, spec.checkpoint_key, spec.checkpoint_skip, wanted, say)
    weights = translate_names(weights, wanted)
    head = classifier_names(model)
    found = [weights[name].shape[0] for name in head if name in weights and weights[name].ndim]
    other = next((count for count in found if count != classes), None)
    if other is not None and not trains:
        where = ", ".join(sorted({name.rpartition(".")[0] for name in head}))
        raise PruneError(
            f"class count mismatch: the data has {classes} classes, the head {where!r} of {place} has {other}. "
            "Use the data set that the checkpoint was trained on, or set train.epochs: the head is made anew then, and "
            "the network trained from these weights"
        )
    new = head if trains and (other is not None or not found) else ()
    tensor_files.load_strictly(model, weights, str(place), new)
    variances = [tensor for name, tensor in weights.items() if name.endswith("running_var")]
    if trains and variances and all(bool(((tensor - 1).abs() < 1e-3).all()) for tensor in variances):
        say(
            f"every batch norm of {place.name} has the variance 1: folded into its neighbours, or never trained. "
            "A training counts anew and changes what the network computes"
        )
    if not new:
        return ""
    return f"that of {place.name} has {other} classes" if other is not None else f"{place.name} has none"


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names in the network's state of its classifier, or of the several that distilled networks have."""
    get = getattr(model, "get_classifier", None)
    found = get() if callable(get) else None
    heads = found if isinstance(found, tuple | list) else (found,)
    names = [name for name, module in model.named_modules() if any(module is head for head in heads)]
    return tuple(entry for entry in model.state_dict() if any(entry.startswith(f"{name}.") for name in names))
