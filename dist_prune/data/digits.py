"""The 1,797 digits of 8x8 pixels that scikit-learn carries, and their split; its own import takes seconds."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from dist_prune.errors import PruneError

PLACE = "datasets/data/digits.csv.gz"  # in the package; 64 pixels of 0 to 16 and the label, one image a row
SIDE, WHITE = 8, 16
# One bit an image, the first one highest: whether it is one of the 450 test images, as scikit-learn's
# train_test_split(range(1797), test_size=450, random_state=0, stratify=labels) draws them.
IS_TEST = (
    "000004883526104000164101934205001a00080102240028062c1e081108960a009019120420f8a0028110e040080a9a304415244942"
    "c0a00a2030804004d821408b8020004885c400104008a0900005486800301000020ec409001224840083b8013c21a69c0a0204000f48"
    "400804a4184902124061e5008024604e94376a819216015480004842a0a4180a5000a40b8561e688108049124c80c02205068e000109"
    "f202c141398813c009190000148e01008410a0e10033282900c144c8c0680a0102930292030922a6402c26042108a8608198c8a01412"
    "861202128138a41500"
)


def read_digits(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read one split.

    Args:
        train: the 1,347 training images, otherwise the 450 test images.

    Returns:
        Pixels (n, 8, 8, 1) as uint8, and labels (n,) as int64; in the order of the file.

    Raises:
        PruneError: scikit-learn, which carries the file, is not installed.
    """
    found = importlib.util.find_spec("sklearn")
    files = [Path(folder) / PLACE for folder in (found.submodule_search_locations or [])] if found else []
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise PruneError(f"data.source: digits is in scikit-learn ({PLACE}), which is not installed here")
    with gzip.open(file, "rt") as text:
        rows = np.loadtxt(text, delimiter=",")
    pixels = (rows[:, :-1].reshape(-1, SIDE, SIDE, 1) * (255 / WHITE)).round().astype(np.uint8)
    is_test = np.unpackbits(np.frombuffer(bytes.fromhex(IS_TEST), np.uint8))[: len(rows)].astype(bool)
    chosen = is_test != train
    return pixels[chosen], rows[chosen, -1].astype(np.int64)
