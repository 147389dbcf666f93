"""Recipes of earlier versions: old names of keys, and keys that came later."""

from collections.abc import Mapping
from typing import Any

# Old name of a key -> present name. Recipes with the old names are read; fingerprints are hashed under them.
RENAMED = {
    "score.many": "score.compare",
    "train.save_every_minutes": "train.checkpoint_every_minutes",
    "finetune.save_every_minutes": "finetune.checkpoint_every_minutes",
}
OLD_NAMES = {new: old for old, new in RENAMED.items()}

# Keys that are younger than the first run directories, and their defaults, which a directory without the key has.
ADDED: dict[str, Any] = {
    "backbone.bundle": None,
    "backbone.checkpoint_key": "auto",
    "backbone.checkpoint_skip": [],
    "backbone.protect": [],
    "backbone.streams": False,
    "backbone.units": "earlier",
    "data.augment_on": "host",
    "data.class_map": None,
    "data.class_order": None,
    "data.dct_scaled": False,
    "data.decoder": "pillow",
    "data.kwargs": {},
    "data.layout": None,
    "data.resizer": "pillow",
    "select.search": None,
    "select.from": None,
    "data.stage_to": None,
    "target.latency_tolerance": 0.05,
    "target.memory": None,
    "select.norms": "plain",
    "select.depth": False,
    "repair.method": "none",
    "repair.images": 256,
    "repair.ridge": "auto",
    "repair.micro_batch": 16,
    "repair.memory_mb": 2048,
    "task": {"name": "classification"},
    "train.freeze_bn": False,
    "finetune.freeze_bn": False,
}
ADDED_TO: dict[str, dict[str, Any]] = {  # method -> the same for its options
    **{
        name: {"method.normalise": True}
        for name in ("dirichlet", "fisher", "l1", "l2", "random", "sensitivity", "shapley")
    },
    "mint": {"method.normalise": True, "method.criterion": "information"},
    "entropy": {"method.normalise": True, "method.taps": "consumed"},
}


def drop_added_defaults(fields: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Remove the keys of ``ADDED`` and ``ADDED_TO`` that have their defaults.

    Args:
        fields: dotted key or section -> value, of a resolved recipe.
        method: the recipe's method.
    """
    out = {key: dict(value) if isinstance(value, Mapping) else value for key, value in fields.items()}
    for key, default in (ADDED | ADDED_TO.get(method, {})).items():
        if key in out and out[key] in (default, None):
            del out[key]
        section, _, leaf = key.partition(".")
        inner = out.get(section)
        if isinstance(inner, dict) and inner.get(leaf) == default:
            inner.pop(leaf, None)
    return out


def rename_old_keys(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Give dotted keys of a recipe their present names."""
    return {RENAMED.get(key, key): value for key, value in flat.items()}


def fingerprint_fields(fields: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The fields of a fingerprint as every version hashes them: without later keys' defaults, under old names.

    Args:
        fields: dotted key or section -> value, of a resolved recipe.
        method: the recipe's method.
    """
    return {OLD_NAMES.get(key, key): value for key, value in drop_added_defaults(fields, method).items()}
