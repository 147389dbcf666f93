"""Bundles with a fault in the manifest, the weights or the bytes: a network that answers, or a sentence."""

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.export.test_hostile_bundles import answered, damaged, whole_bundle
from tests.support import tiny

Case = tuple[str, Callable[[], object]]


def cases(seed: int, count: int) -> Iterator[Case]:
    """A fault drawn by the seed in each case."""
    folder = Path(tempfile.mkdtemp(prefix="dist_prune-bundles-"))
    try:
        start, draw = whole_bundle(tiny.bundled(folder / "good")), random.Random(seed)
        (folder / "bad").mkdir()
        for number in range(count):
            yield f"bundle {number}", partial(answered, folder / "bad", damaged(draw, *start))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
