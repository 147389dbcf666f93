"""What run directories of earlier versions mean: keys that they lack, names that their files have. Knows no torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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


def without_added(fields: Mapping[str, Any], method: str) -> dict[str, Any]:
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


# Artifacts of a run directory that were renamed -> the name that they had first. Fingerprints are made of first names.
FIRST_NAMES = {
    "pruned.safetensors": "small.safetensors", "finetuned.safetensors": "tuned.safetensors",
    "optimizer_state.safetensors": "state.safetensors", "optimizer_carried.safetensors": "carried.safetensors",
    "stage_started.json": "begun.json",
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
