"""Run directories of earlier versions: the first names of artifacts, on the disk and in fingerprints."""

from collections.abc import Iterable
from pathlib import Path

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
