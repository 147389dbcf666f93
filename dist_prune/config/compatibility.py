"""Run directories of earlier versions: keys that they lack, and old names of keys, files and classes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
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
    "backbone.checkpoint_key": "auto",
    "backbone.checkpoint_skip": [],
    "data.class_map": None,
    "data.class_order": None,
    "data.layout": None,
    "target.latency_tolerance": 0.05,
}
ADDED_TO: dict[str, dict[str, Any]] = {  # method -> the same for its options
    **{
        name: {"method.normalise": True}
        for name in ("dirichlet", "fisher", "l1", "l2", "mint", "random", "sensitivity", "shapley")
    },
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


# Present name of an artifact -> its first name. Fingerprints are made of first names.
FIRST_NAMES = {
    "pruned.safetensors": "small.safetensors",
    "finetuned.safetensors": "tuned.safetensors",
    "optimizer_state.safetensors": "state.safetensors",
    "optimizer_carried.safetensors": "carried.safetensors",
    "stage_started.json": "begun.json",
    "criteria.json": "many.json",
    "criteria.safetensors": "many.safetensors",
}


def first_name(artifact: str) -> str:
    """The first name of an artifact, for example of ``round_1/pruned.safetensors``."""
    folder, slash, file = artifact.rpartition("/")
    return folder + slash + FIRST_NAMES.get(file, file)


def keeps_first_names(run_dir: Path, outputs: Iterable[str]) -> bool:
    """Whether a run directory was begun under first names; it keeps them to its end.

    Args:
        run_dir: the run directory. Under first names, a run wrote ``begun.json`` before any other file.
        outputs: the artifacts that its ledger names.
    """
    first = FIRST_NAMES.values()
    return (run_dir / "begun.json").exists() or any(name.rpartition("/")[2] in first for name in outputs)


def artifact(folder: Path, name: str) -> Path:
    """The path of a run directory's file, under its first name if an earlier version wrote it."""
    old = folder / first_name(name)
    return old if old.is_file() and not (folder / name).exists() else folder / name


# Present name of a class -> its first name: partial scores are recognised by the name of their statistic.
FIRST_CLASS_NAMES = {
    "ZeroCounts": "Zeros",
    "MapRanks": "Ranks",
    "ActivationCensus": "Census",
    "SquaredChange": "Squares",
    "FirstOrderChange": "Products",
    "JointStatistic": "Several",
}


def first_class_name(value: object) -> str:
    """The first name of the class of ``value``."""
    name = type(value).__name__
    return FIRST_CLASS_NAMES.get(name, name)
