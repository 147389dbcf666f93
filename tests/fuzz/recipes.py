"""Recipes with one to three faults in their text: taken, or refused in a sentence, at once."""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from dist_prune.config import loading
from tests.config.test_hostile_recipes import FUZZED, loaded, mutated

Case = tuple[str, Callable[[], None]]


def cases(seed: int, count: int) -> Iterator[Case]:
    """Faults drawn by the seed, in five recipes by turns."""
    folder = Path(tempfile.mkdtemp(prefix="dist_prune-recipes-"))
    try:
        texts, draw = [loading.find(name).read_text() for name in FUZZED], random.Random(seed)
        for number in range(count):
            yield f"recipe {number}", partial(_try, folder / "x.yaml", mutated(texts[number % len(texts)], draw))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _try(file: Path, raw: bytes) -> None:
    file.write_bytes(raw)
    start = time.process_time()
    spec, said = loaded(file)
    assert time.process_time() - start < 1
    assert len(said) < 20_000
    if spec is not None:
        json.dumps(spec.written(), allow_nan=False)
