"""Every file that a run reads back, damaged: it goes on from what is whole, starts over, or says a sentence."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dist_prune.data import folder_index
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.parallel_map import map_jobs
from dist_prune.distributed.result_cache import ResultCache
from dist_prune.distributed.resumable_state import ResumableState
from dist_prune.errors import PruneError
from dist_prune.fileio import read_json, write_atomic
from dist_prune.pipeline.artifact_store import ArtifactStore
from dist_prune.pipeline.ledger import Ledger
from dist_prune.training.checkpoints import CheckpointManager
from tests.fuzz import damage

Case = tuple[str, Callable[[], None]]
TABLE = torch.arange(12.0).reshape(3, 4)
RUN = Path("run")


def states(place: Path) -> CheckpointManager:
    return CheckpointManager(place / "checkpoints", "me", keep=3, say=lambda text: None)


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"weight": TABLE * step}


def make_states(place: Path) -> None:
    for step in (5, 9):
        found = states(place)
        found.save(step, weights(step), {"epoch": step})
        found.wait()


def check_states(place: Path) -> None:
    """The newest or the one before, whole; and the training that goes on can save in the damaged one's place."""
    found = states(place)
    name = found.newest()
    assert name is not None, "no checkpoint is left, though one was whole"
    from dist_prune.distributed import tensor_files

    tensors, meta = tensor_files.read_tensors(place / "checkpoints" / name)
    assert meta["step"] in (5, 9)
    assert torch.equal(tensors["weight"], TABLE * meta["step"])
    found.save(9, weights(9), {"epoch": 9})
    found.wait()
    assert (states(place).newest() or "").startswith("step_000000009")


def make_kept(place: Path) -> None:
    ResumableState(place / "kept.safetensors", "these", Communicator()).save({"a": TABLE, "b": TABLE.long()})


def check_kept(place: Path) -> None:
    found, _ = ResumableState(place / "kept.safetensors", "these", Communicator()).load()
    assert not found or (torch.equal(found["a"], TABLE) and torch.equal(found["b"], TABLE.long()) and len(found) == 2)


def jobs(place: Path) -> list[torch.Tensor]:
    run = lambda job: TABLE * job  # noqa: E731
    return map_jobs(
        [1, 2, 3], run, Communicator(), lambda rounds, count: rounds, place / "shared.safetensors", "me", "call"
    )


def make_jobs(place: Path) -> None:
    jobs(place)


def check_jobs(place: Path) -> None:
    assert all(torch.equal(found, TABLE * job) for job, found in zip((1, 2, 3), jobs(place), strict=True))


def make_record(place: Path) -> None:
    ResultCache(place / "record.jsonl", "these", Communicator()).add([(["a", n], {"value": n / 7}) for n in range(5)])


def check_record(place: Path) -> None:
    found = ResultCache(place / "record.jsonl", "these", Communicator())
    assert all(found[job] == {"value": job[1] / 7} for job in (["a", n] for n in range(9)) if job in found)
    found.add([(["a", 9], {"value": 9 / 7})])
    assert ResultCache(place / "record.jsonl", "these", Communicator())[["a", 9]] == {"value": 9 / 7}


LINE = {"fingerprint": "f", "outputs": {}, "facts": {"top1": 91.25}, "outside": {"train": "abc"}}


def make_ledger(place: Path) -> None:
    for stage in ("train", "score"):
        Ledger(place).append({"stage": stage, **LINE})


def check_ledger(place: Path) -> None:
    for line in Ledger(place).lines():
        assert line["stage"] in ("train", "score")
        assert {key: line[key] for key in LINE} == LINE
    Ledger(place).append({"stage": "select", **LINE})
    assert Ledger(place).done("select", "f") is not None


def make_shelf(place: Path) -> None:
    write_atomic(place / RUN / "dense.bin", b"weights" * 9)
    ArtifactStore(place / "shelf", place / RUN, 60.0).publish("key", place / RUN, ["dense.bin"], {"top1": 1.5})


def check_shelf(place: Path) -> None:
    found = ArtifactStore(place / "shelf", place / "other", 60.0).take("key", place / "other")
    assert found["facts"] == {"top1": 1.5} or not (place / "shelf/key/line.json").is_file()
    assert (place / "other/dense.bin").read_bytes() == b"weights" * 9


def make_index(place: Path) -> None:
    for name in ("cat", "dog"):
        (place / "train" / name).mkdir(parents=True)
        for n in range(2):
            Image.fromarray(np.full((4, 4, 3), n, np.uint8)).save(place / "train" / name / f"{n}.png")
    folder_index.save(folder_index.scan(place / "train"), place / "train.index.npz")


def check_index(place: Path) -> None:
    found = folder_index.load(place / "train.index.npz")
    want = folder_index.scan(place / "train")
    assert found is None or (found.digest == want.digest and found.classes == want.classes)


def make_note(place: Path) -> None:
    write_atomic(place / "note.json", json.dumps({"stage": "train", "outside": {"train": "abc"}}))


def check_note(place: Path) -> None:
    assert isinstance(read_json(place / "note.json"), dict)


# kind -> makes, reads back, which files are damaged
KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], str]] = {
    "newest checkpoint": (make_states, check_states, "checkpoints/step_000000009*"),
    "kept tables": (make_kept, check_kept, "kept.safetensors"),
    "shared jobs": (make_jobs, check_jobs, "shared.safetensors"),
    "record": (make_record, check_record, "record.jsonl"),
    "ledger": (make_ledger, check_ledger, "ledger.jsonl"),
    "shelf": (make_shelf, check_shelf, "shelf/key/*"),
    "image index": (make_index, check_index, "train.index.npz"),
    "note": (make_note, check_note, "note.json"),
}


def cases(seed: int, count: int) -> Iterator[Case]:
    """Kinds and damages in turn, places within the files by the seed."""
    rng = random.Random(seed)
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        harm = damage.ALL[number // len(KINDS) % len(damage.ALL)]
        yield f"{kind}: {harm.__name__} ({number})", partial(_try, kind, harm, rng.random())


def _try(kind: str, harm: damage.Damage, seed: float) -> None:
    make, check, pattern = KINDS[kind]
    rng = random.Random(seed)
    place = Path(tempfile.mkdtemp(prefix="dist_prune-fuzz-"))
    try:
        make(place)
        files = sorted(place.glob(pattern))
        assert files, f"{kind}: nothing to damage"
        harm(rng.choice(files), rng)
        try:
            check(place)
        except PruneError as error:
            assert kind != "newest checkpoint", f"{harm.__name__}: {error}"
            assert str(error)
    finally:
        shutil.rmtree(place)
