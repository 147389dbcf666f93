"""Names that users of other pruning libraries already use: the same thing under our name, or our nearest one."""

import re
from collections.abc import Iterable
from importlib.metadata import entry_points

from dist_prune.errors import nearest

# name elsewhere -> the method here that is the same thing; recipes record the name on the right
METHOD_ALIASES = {
    "bn_importance": "bn_scale",
    "bn_scaling": "bn_scale",
    "brain_damage": "obd",
    "dep_graph": "group_norm",
    "depgraph": "group_norm",
    "dirichlet_pruning": "dirichlet",
    "fisher_pruning": "fisher",
    "geometric_median": "fpgm",
    "group_magnitude": "group_norm",
    "hap": "hessian_trace",
    "high_rank": "hrank",
    "l1_norm": "l1",
    "l1norm": "l1",
    "l2_norm": "l2",
    "l2norm": "l2",
    "magnitude": "l1",
    "network_slimming": "bn_scale",
    "network_trimming": "apoz",
    "optimal_brain_damage": "obd",
    "pfec": "l1",
    "random_pruning": "random",
    "redundancy_graph": "graph",
    "sensitivity_pruner": "sensitivity",
    "shapley_pruning": "shapley",
    "slimming": "bn_scale",
    "taylor_fo": "taylor",
}
# name elsewhere -> (the nearest method here, how it differs)
METHOD_RELATIVES = {
    "amc": ("taylor", "the ratios of the layers come from select.scope=global, not from reinforcement learning"),
    "autoslim": ("taylor", "select.scope=global shares the target out over the layers"),
    "fishermask": ("fisher", "it removes channels, not single weights"),
    "grasp": ("taylor", "it ranks trained channels by the loss, not weights at initialisation by the gradient flow"),
    "growing_regularization": ("group_norm", "with train.sparsity=group_norm, whose weight does not grow"),
    "hessian": ("hessian_trace", "curvature of the loss for each channel"),
    "lamp": ("l1", "with select.scope=global; LAMP normalises single weights, l1 whole channels"),
    "lottery_ticket": ("l1", "it keeps the trained weights and removes channels"),
    "movement": ("taylor", "it multiplies weights and gradients of one pass, not of a finetuning"),
    "nisp": ("taylor", "importance comes from the loss, not from the last layer's responses"),
    "obs": ("obd", "it uses the diagonal of the Hessian only"),
    "sfp": ("l2", "its criterion; channels are removed at once, not set to zero during a training"),
    "snip": ("taylor", "the same product of weight and gradient, for channels of a trained network"),
    "soft_filter_pruning": ("l2", "its criterion; channels are removed at once"),
    "sparsegpt": ("obd", "it removes channels of vision networks"),
    "synflow": ("taylor", "it needs images, and a trained network"),
    "thinet": ("chip", "it ranks channels by their feature maps; ThiNet reconstructs the next layer's input"),
    "wanda": ("l1", "it ranks by the weights alone, without the norms of the activations"),
}
# key elsewhere -> our key or our words for it
KEY_RELATIVES = {
    "amount": "target.macs (the share that is kept: 1 - amount)",
    "architecture": "backbone.name",
    "arch": "backbone.name",
    "batch_size": "train.batch, finetune.batch, evaluate.batch (global); score.micro_batch for scoring",
    "bs": "train.batch, finetune.batch",
    "calibration_images": "score.images",
    "calibration_samples": "score.images",
    "ch_sparsity": "target.channels, or select.keep_ratio (the share that is kept: 1 - ch_sparsity)",
    "channel_groups": "none: groups are found by tracing ('dist-prune check RECIPE' shows them)",
    "channel_sparsity": "target.channels, or select.keep_ratio (the share that is kept: 1 - channel_sparsity)",
    "checkpoint_path": "backbone.checkpoint",
    "criterion": "method.name",
    "data_dir": "data.root",
    "data_path": "data.root",
    "dataset": "data.source",
    "distillation": "finetune.distill",
    "dst": "target",
    "ft_epochs": "finetune.epochs",
    "global_pruning": "select.scope (global or local)",
    "ignored_layers": "select.exclude",
    "img_size": "data.image_size",
    "importance": "method.name",
    "input_size": "data.image_size",
    "iterative_steps": "schedule.rounds",
    "keep": "select.keep_ratio",
    "kd": "finetune.distill",
    "learning_rate": "train.lr, finetune.lr",
    "max_ch_sparsity": "select.max_ratio (the largest share that is removed)",
    "max_pruning_ratio": "select.max_ratio (the largest share that is removed)",
    "model": "backbone.name",
    "model_name": "backbone.name",
    "network": "backbone.name",
    "num_classes": "none: the data decide it (data.classes for a subset)",
    "num_epochs": "train.epochs, finetune.epochs",
    "num_workers": "data.workers",
    "optim": "train.optimizer, finetune.optimizer",
    "pretrained_path": "backbone.checkpoint",
    "prune_ratio": "target.macs, or select.keep_ratio (the share that is kept: 1 - prune_ratio)",
    "pruning_ratio": "target.macs, or select.keep_ratio (the share that is kept: 1 - pruning_ratio)",
    "pruning_ratio_dict": "select.keep_ratios (the shares that are kept)",
    "pruning_rate": "target.macs, or select.keep_ratio (the share that is kept: 1 - pruning_rate)",
    "round_to_multiple": "select.round_to",
    "sparsity": "target.macs, or select.keep_ratio (the share that is kept: 1 - sparsity)",
    "target_sparsity": "target.macs, or target.params (the share that is kept: 1 - target_sparsity)",
    "unwrapped_parameters": "none: they are found by tracing",
    "val_split": "data.eval_split",
    "wd": "train.weight_decay, finetune.weight_decay",
    "weights": "backbone.checkpoint",
}
# cost elsewhere -> our target. Shares of FLOPs and MACs are the same number, and FLOPs themselves are twice the MACs.
TARGET_RELATIVES = {
    "flops": "target.macs (FLOPs are 2 x MACs, a share of them is the same number)",
    "gflops": "target.macs (a share, not an amount)",
    "gmacs": "target.macs (a share, not an amount)",
    "madds": "target.macs",
    "model_size": "target.params",
    "mult_adds": "target.macs",
    "n_params": "target.params",
    "parameters": "target.params",
    "size": "target.params",
    "speed": "target.latency (the share of the dense network's time)",
    "time": "target.latency (the share of the dense network's time)",
    "width": "target.channels",
}
# keyword of other libraries' functions -> the argument of dist_prune.select or of another function here
KEYWORD_RELATIVES = {
    "norms": "dist_prune.repair(..., norms='refit')",
    "amount": "target={'macs': 1 - amount}",
    "ch_sparsity": "keep_ratio=1 - ch_sparsity, or target={'channels': 1 - ch_sparsity}",
    "example_inputs": "dist_prune.trace(model, example)",
    "global_pruning": "scope='global' or 'local'",
    "ignored_layers": "exclude=[globs of layer names]",
    "importance": "the method of dist_prune.score(model, graph, method, loader)",
    "iterative_steps": "none: call score, select and prune once for each round",
    "max_pruning_ratio": "max_ratio (the largest share that is removed)",
    "pruning_ratio": "target={'macs': 1 - pruning_ratio}, or keep_ratio=1 - pruning_ratio",
    "pruning_ratio_dict": "keep_ratios={glob: share that is kept}",
    "sparsity": "target={'macs': 1 - sparsity}, or keep_ratio=1 - sparsity",
}


def plain(name: str) -> str:
    """A name in lower case, with underscores for every other sign: ``L1-Norm`` is ``l1_norm``."""
    return re.sub(r"\W+", "_", name.strip().lower())


def canonical_method(name: str) -> str:
    """The name under which a method is recorded.

    Args:
        name: as a user wrote it.

    Returns:
        The name here if it is an alias, else the name itself. A name that another package registers is never an alias.
    """
    key = plain(name)
    if key not in METHOD_ALIASES or any(point.name == name for point in entry_points(group="dist_prune.methods")):
        return name
    return METHOD_ALIASES[key]


def method_suggestion(name: str) -> str:
    """A sentence that names the nearest method here, or an empty text if the name is not known from elsewhere."""
    relative = METHOD_RELATIVES.get(plain(name))
    return f" {name} is not here; nearest: {relative[0]} ({relative[1]})." if relative else ""


def key_suggestion(name: str, allowed: Iterable[str], within: str = "") -> str:
    """A sentence that names our key for one that is known from elsewhere.

    Args:
        name: the unknown key, without its section.
        allowed: keys that exist at its place.
        within: the section that the key lies in; "" at the top.

    Returns:
        The sentence with a leading blank; the most similar allowed key if the name is not known from elsewhere; "" if
        there is neither.
    """
    allowed, key = list(allowed), plain(name)
    table = TARGET_RELATIVES if within == "target" else KEY_RELATIVES
    other = table.get(key) or (KEY_RELATIVES if within == "target" else TARGET_RELATIVES).get(key)
    return f" Write {other}." if other else nearest(name, allowed)
