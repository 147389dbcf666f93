"""Short names of compared runs: the method, the target, and the keys in which runs of one method and network differ."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dist_prune.fileio import canonical

# Keys that tell nothing of what was run: names, places, and how it is measured and watched.
SILENT = ("seed", "name", "cluster", "report", "backbone.name", "method.name", "target")
WORDS = 4  # most keys of a name
LONG = 24  # letters of a value


def target_text(report: Mapping[str, Any]) -> str:
    """What a run was asked to keep: ``macs 0.5``, ``threshold 0.7``, or an empty text.

    Args:
        report: The body of report.json.
    """
    asked = [f"{name} {share:g}" for name, share in report["target"].items()]
    select = report["recipe"].get("select") or {}
    given = [
        f"{key} {select[key]:g}" for key in ("threshold", "keep_ratio") if isinstance(select.get(key), int | float)
    ]
    return ", ".join(asked or given)


def short_names(keys: Sequence[Mapping[str, Any]], targets: Sequence[str], folders: Sequence[str]) -> list[str]:
    """A name for each of several recipes, without what all of them share.

    ``graph 0.3`` is the method and its target, where all targets are of one cost. Keys that differ among the runs of
    one method and one network follow. Names of one network that are still equal get the run directory.

    Args:
        keys: The resolved keys of each recipe, flat.
        targets: What each was asked to keep (``target_text``).
        folders: The run directory of each.

    Returns:
        Their names; those of one network are all different where the folders are.
    """
    costs = {target.rpartition(" ")[0] for target in targets}
    names = []
    for own, target in zip(keys, targets, strict=True):
        words = [str(own.get("method.name", ""))]
        if len(set(targets)) > 1 and target:
            words.append(target.rpartition(" ")[2] if len(costs) == 1 else target)
        peers = [other for other in keys if all(other.get(k) == own.get(k) for k in ("method.name", "backbone.name"))]
        words += _differing(own, peers, target)
        names.append(" ".join(words))
    networks = [str(own.get("backbone.name", "")) for own in keys]
    count = Counter(zip(networks, names, strict=True))
    return [
        name if count[network, name] == 1 else f"{name} ({folder})"
        for network, name, folder in zip(networks, names, folders, strict=True)
    ]


def _differing(own: Mapping[str, Any], peers: Sequence[Mapping[str, Any]], target: str) -> list[str]:
    every = dict.fromkeys(key for other in peers for key in other)
    silent = {*(f"select.{word}" for word in target.split(" ")[:1])}
    found = [
        key
        for key in every
        if len({canonical(other.get(key)) for other in peers}) > 1
        and key not in silent
        and not any(key == word or key.startswith(f"{word}.") for word in SILENT)
    ]
    lasts = Counter(key.rpartition(".")[2] for key in every)
    words = []
    for key in found[:WORDS]:
        last = key.rpartition(".")[2]
        value = own.get(key)
        text = f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
        words.append(f"{last if lasts[last] == 1 else key} {text if len(text) <= LONG else text[: LONG - 1] + '…'}")
    return words
