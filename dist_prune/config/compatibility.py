"""What run directories of earlier versions mean: keys that they lack, old names of keys and files. Knows no torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Name of before -> name now. Recipes with the old names are read; fingerprints are hashed under them.
RENAMED = {
    "score.many": "score.compare", "train.save_every_minutes": "train.checkpoint_every_minutes",
    "finetune.save_every_minutes": "finetune.checkpoint_every_minutes",
}  # fmt: skip
OLD_NAMES = {new: old for old, new in RENAMED.items()}

# Keys that came after run directories were first written: their defaults are what a directory without them means.
ADDED: dict[str, Any] = {
    "backbone.checkpoint_key": "auto", "backbone.checkpoint_skip": [], "data.class_map": None, "data.class_order": None,
    "data.layout": None, "target.latency_tolerance": 0.05,
}  # fmt: skip
ADDED_TO: dict[str, dict[str, Any]] = {  # the same of methods' options
    **{
        name: {"method.normalise": True}
        for name in ("dirichlet", "fisher", "l1", "l2", "mint", "random", "sensitivity", "shapley")
    },
    "entropy": {"method.normalise": True, "method.taps": "consumed"},
}


def drop_added_defaults(fields: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Dotted keys or sections of a resolved recipe, less the keys of ADDED that have their default values."""
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
    """Dotted keys of a recipe, renamed ones under their present names."""
    return {RENAMED.get(key, key): value for key, value in flat.items()}


def fingerprint_fields(fields: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The fields of a fingerprint as every version hashed them: without later keys' defaults, under old names."""
    return {OLD_NAMES.get(key, key): value for key, value in drop_added_defaults(fields, method).items()}


# Artifacts of a run directory that were renamed -> the name that they had first. Fingerprints are made of first names.
FIRST_NAMES = {
    "pruned.safetensors": "small.safetensors", "finetuned.safetensors": "tuned.safetensors",
    "optimizer_state.safetensors": "state.safetensors", "optimizer_carried.safetensors": "carried.safetensors",
    "stage_started.json": "begun.json", "criteria.json": "many.json",
    "criteria.safetensors": "many.safetensors",
}  # fmt: skip


def first_name(artifact: str) -> str:
    """The name that an artifact, for example ``round_1/pruned.safetensors``, had first."""
    folder, slash, file = artifact.rpartition("/")
    return folder + slash + FIRST_NAMES.get(file, file)


def keeps_first_names(run_dir: Path, outputs: Iterable[str]) -> bool:
    """Whether a run directory was begun with first names: it goes on with them to its end.

    Args:
        run_dir: the run directory; with first names, ``begun.json`` was the first file that a run wrote.
        outputs: the artifacts that its ledger names.
    """
    first = FIRST_NAMES.values()
    return (run_dir / "begun.json").exists() or any(name.rpartition("/")[2] in first for name in outputs)


def artifact(folder: Path, name: str) -> Path:
    """A file of a run directory; under its first name if an earlier version has written it."""
    old = folder / first_name(name)
    return old if old.is_file() and not (folder / name).exists() else folder / name


# Classes that were renamed -> the names that they had first: partial scores are recognised by their statistic's name.
FIRST_CLASS_NAMES = {
    "ZeroCounts": "Zeros", "MapRanks": "Ranks", "ActivationCensus": "Census", "SquaredChange": "Squares",
    "FirstOrderChange": "Products", "JointStatistic": "Several",
}  # fmt: skip


def first_class_name(value: object) -> str:
    """The name that the class of ``value`` had first."""
    name = type(value).__name__
    return FIRST_CLASS_NAMES.get(name, name)
