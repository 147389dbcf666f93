"""Image files without targets: ROOT/<split> with image files at any depth."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_prune.data.folder_index import Names
from dist_prune.data.folder_scan import left_out_text, scan_folder
from dist_prune.data.random_access import SplitSpec
from dist_prune.errors import PruneError

EXPECTED_FORM = (
    "images: ROOT/train and ROOT/val with image files, in folders or not (data.train_split and data.eval_split name "
    "other sub-folders; . is ROOT itself)"
)


@dataclass(frozen=True)
class PlainFolderSource:
    """Image files, decoded to RGB when they are loaded. They have no classes.

    Attributes:
        folder: the folder of the split.
        names: paths of the files relative to it, in the order of the sample ids.
        digest: of names and sizes.
        note: where the list of files came from, and which files were left out.
    """

    folder: Path
    names: Names
    digest: str
    note: str = ""
    classes = ("any",)
    in_chans = 3
    fixed_size = None
    images = None
    backends = ("torch",)
    target_kind = "nothing"

    @property
    def labels(self) -> np.ndarray:
        """(n,) zeros: images are drawn uniformly."""
        return np.zeros(len(self.names), dtype=np.int64)

    @property
    def identity(self) -> str:
        """Digest of file names and sizes. The files are not read."""
        return self.digest

    def location(self, sample: int) -> str:
        """Path of the sample's file, for messages."""
        return str(self.folder / self.names[sample])

    def fetch(self, sample: int) -> Path:
        """Path of the sample's file."""
        return self.folder / self.names[sample]


def open_images(spec: SplitSpec) -> PlainFolderSource:
    """Open a split of images without targets.

    Args:
        spec: the split that the recipe asks for.

    Raises:
        PruneError: there is no such folder, or it has no image.
    """
    folder, key = spec.path(EXPECTED_FORM) / spec.split, "data.train_split" if spec.train else "data.eval_split"
    if not folder.is_dir():
        raise PruneError(f"{key}: there is no folder {folder}. {EXPECTED_FORM}")
    scan = scan_folder(folder, "", ())
    left_out = left_out_text(scan.left_out)
    if not scan.files:
        raise PruneError(f"{key}: {folder} holds no image file{left_out}. {EXPECTED_FORM}")
    text = "\n".join(f"{size} {name}" for name, size in scan.files)
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    names = Names.from_names(name for name, _ in scan.files)
    return PlainFolderSource(folder, names, digest, f"{len(names):,} images without classes{left_out}")
