"""Write a split as tar shards: the stored image files in the order of their sample ids, resumable shard by shard.

``NAME-train-000000.tar`` and so on, and ``NAME-train.json``, which names the source, the classes, and for each shard
its images and the sha256 of its bytes. The bytes depend on the images alone: a command that was killed and is run again
gives the same files.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from dist_prune.data.folder_scan import HIDDEN, IMAGE_FILES
from dist_prune.data.random_access import RandomAccessSource, StoredImage
from dist_prune.errors import PruneError
from dist_prune.fileio import digest, file_digest, read_json, write_atomic

_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"BM": ".bmp", b"GI": ".gif"}


def write_shards(
    source: RandomAccessSource,
    folder: Path,
    name: str,
    shard_bytes: int,
    on_error: str,
    say: Callable[[str], None],
    bar: Callable[[int, int], Any],
) -> dict[str, Any]:
    """Write the images of one split; finished shards of an earlier attempt are kept.

    Args:
        source: the opened split.
        folder: where the shards go.
        name: start of their names, with the split: ``imagenet-train``.
        shard_bytes: a shard is closed once it holds so many bytes.
        on_error: ``fail`` ends at an image that cannot be read, ``skip`` leaves it out and lists it.
        say: takes lines for the user.
        bar: makes a progress bar from (number of images done, of all); it has ``update(n)`` and ``close()``.

    Returns:
        The content of ``NAME.json``.

    Raises:
        PruneError: an image cannot be read, the folder holds shards of other images, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PruneError(f"--out: the folder {folder} cannot be made: {error.strerror or error}") from error
    manifest = folder / f"{name}.json"
    command = {
        "identity": source.identity,
        "images": len(source.labels),
        "shard_bytes": shard_bytes,
        "on_error": on_error,
    }
    facts: dict[str, Any] = {**command, "classes": list(source.classes), "skipped": {}, "shards": []}
    if manifest.exists():
        earlier = read_json(manifest)
        if {key: earlier.get(key) for key in command} != command:
            raise PruneError(
                f"{manifest} describes shards of other images or another --shard-mb: name another folder, or delete "
                f"{name}-*.tar and it"
            )
        facts["shards"], facts["skipped"] = _finished(folder, earlier["shards"]), earlier["skipped"]
        if facts["shards"]:
            say(f"{len(facts['shards'])} finished shards are kept")
    elif others := sorted(folder.glob(f"{name}-*.tar")):
        raise PruneError(f"{others[0]} is there already, and no {manifest.name} says of what: name another folder")
    done = int(facts["shards"][-1]["end"]) if facts["shards"] else 0
    progress = bar(done, len(source.labels))
    try:
        while done < len(source.labels):
            path = folder / f"{name}-{len(facts['shards']):06}.tar"
            entry = _write_shard(source, done, path, shard_bytes, on_error, facts["skipped"], progress)
            facts["shards"].append(entry)
            done = entry["end"]
            write_atomic(manifest, json.dumps(facts, indent=1))
    finally:
        progress.close()
    write_atomic(manifest, json.dumps(facts, indent=1))
    return facts


def _finished(folder: Path, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shards, from the first on, whose files are as they were written."""
    kept = []
    for shard in shards:
        path = folder / shard["name"]
        if not path.is_file() or file_digest(path) != shard["sha256"]:
            break
        kept.append(shard)
    return kept


def _write_shard(
    source: RandomAccessSource, start: int, path: Path, most: int, on_error: str, skipped: dict[str, str], progress: Any
) -> dict[str, Any]:
    """Write images from ``start`` on until the shard is full; the file gets its name when it is complete."""
    part, end, size, images = path.with_suffix(".part"), start, 0, 0
    numbered = getattr(source, "numbered", False) or source.fixed_size is not None
    in_folders = not numbered and all(map(_is_folder_name, source.classes))
    try:
        with part.open("wb") as out, tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
            while end < len(source.labels) and size < most:
                try:
                    content = image_bytes(source.fetch(end))
                    for member, body in members(source, end, content, in_folders):
                        info = tarfile.TarInfo(member)
                        info.size = len(body)
                        archive.addfile(info, io.BytesIO(body))
                    size, images = size + len(content), images + 1
                except ValueError as error:
                    if on_error == "fail":
                        raise PruneError(
                            f"sample {end}: {source.location(end)} cannot be read: {error}. Mend or remove it, or "
                            "write --on-error skip to leave such images out"
                        ) from error
                    skipped[source.location(end)] = str(error)
                end += 1
                progress.update(1)
            archive.close()  # the end mark
            out.flush()
            os.fsync(out.fileno())
        checked = file_digest(part)
        os.replace(part, path)
    except OSError as error:
        raise PruneError(
            f"{path} cannot be written: {error}. The shards before it are complete; run it again"
        ) from error
    return {
        "name": path.name,
        "start": start,
        "end": end,
        "images": images,
        "bytes": path.stat().st_size,
        "sha256": checked,
    }


def image_bytes(stored: StoredImage) -> bytes:
    """The bytes of an image file; pixels become a PNG, which keeps them.

    Raises:
        ValueError: it is no image file, or there is none.
    """
    if isinstance(stored, bytes):
        content = stored
    elif isinstance(stored, Path):
        try:
            content = stored.read_bytes()
        except OSError as error:
            raise ValueError(str(error)) from error
    else:
        out = io.BytesIO()
        Image.fromarray(stored[..., 0] if stored.shape[2] == 1 else stored).save(out, "PNG")
        content = out.getvalue()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    except Exception as error:  # decoders raise many types on a damaged file
        raise ValueError(str(error) or repr(error)) from error
    return content


def members(source: RandomAccessSource, sample: int, content: bytes, in_folders: bool) -> list[tuple[str, bytes]]:
    """Names and bytes of a sample's members.

    Args:
        source: the opened split.
        sample: sample id.
        content: bytes of its image file.
        in_folders: ``<class>/<id>-<name>.jpg``; else ``<id>.jpg`` and ``<id>.cls``, for classes without names and for
            names that no folder can have.
    """
    label = int(source.labels[sample])
    name = source.classes[label]
    suffix = _SUFFIXES.get(content[:2], ".tif")
    if not in_folders:
        return [(f"{sample:08}{suffix}", content), (f"{sample:08}.cls", str(label).encode())]
    stem, stored = os.path.splitext(PurePosixPath(source.location(sample)).name)
    if stored.lower() in IMAGE_FILES:
        return [(f"{name}/{sample:08}-{stem.rpartition(':')[2]}{stored}", content)]
    return [(f"{name}/{sample:08}{suffix}", content)]


def _is_folder_name(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith(HIDDEN)


def describe(facts: dict[str, Any], folder: Path, name: str) -> str:
    """One paragraph about what was written, for the terminal."""
    shards, images = facts["shards"], sum(shard["images"] for shard in facts["shards"])
    whole = digest("".join(shard["sha256"] for shard in shards))
    lines = [
        f"{images:,} images of {len(facts['classes'])} classes in {len(shards)} shards, "
        f"{sum(shard['bytes'] for shard in shards) / 1e6:,.1f} MB: {folder / name}-*.tar (sha256 of all {whole[:16]})"
    ]
    lines += [f"left out: {where}: {why}" for where, why in list(facts["skipped"].items())[:10]]
    more = len(facts["skipped"]) - 10
    return "\n".join([*lines, *([f"and {more} more, see {name}.json"] if more > 0 else [])])
