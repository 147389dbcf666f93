"""How a person starts a run here: what a launcher is given."""

from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1] / "run.py"


def run_program() -> str:
    """The words that name run.py to ``accelerate launch``, ``torchrun`` and ``python``.

    Returns:
        Its path within a checkout that is the working directory; elsewhere, where the package is installed, its module.
    """
    place = Path("dist_prune") / "run.py"
    return str(place) if place.resolve() == PROGRAM else "-m dist_prune.run"
