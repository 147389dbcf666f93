"""Recipe files: their folders, the file of a name, aliases, and suggestions for unknown names."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from dist_prune.errors import PruneError, path_trouble, shown

LEFT_OUT = "imagenet"  # the data set that recipe names leave out; a name with it means the same recipe
SWEEPS = "sweeps"  # the folder of sweep files among those of recipes
ENDINGS = (".yaml", ".yml")
ALIKE = 0.75  # words with this share of common letters count as the same word, misspelt
SHOWN = 4  # suggestions that an error lists


def recipe_folders() -> list[Path]:
    """The folders that are searched for a bare recipe name, in order."""
    here = Path(__file__).resolve().parents[1]
    return [Path("recipes"), here.parent / "recipes", here / "recipes"]


def known_recipes(below: str = "") -> dict[str, Path]:
    """Every bare name and its file.

    Args:
        below: sub-folder of the recipe folders; ``sweeps`` for sweep files.
    """
    return {name: files[0] for name, files in _by_name(below).items()}


def _by_name(below: str) -> dict[str, list[Path]]:
    """Bare name -> its files in the first recipe folder that has any, there or in a sub-folder of a paper."""
    by_name: dict[str, list[Path]] = {}
    for folder in recipe_folders():
        files: dict[str, list[Path]] = {}
        inner = [] if below else [file for file in folder.glob("*/*.yaml") if file.parent.name != SWEEPS]
        for file in sorted([*(folder / below).glob("*.yaml"), *inner]):
            files.setdefault(file.stem, []).append(file)
        by_name = files | by_name
    return by_name


def header(file: Path) -> dict[str, str]:
    """The comments at the beginning of a recipe file.

    Returns:
        ``title`` (its first sentence) and what follows a word at the margin: ``paper``, ``needs``, ``cost``,
        ``measured`` and the like, each on one line; nothing of a file that does not begin with a comment.

    Raises:
        PruneError: the file cannot be read.
    """
    entries: dict[str, str] = {}
    key = "title"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise PruneError(f"{file} cannot be read: {error}") from error
    for line in lines:
        if not line.startswith("#"):
            break
        word = re.match(r"# ([a-z]+) {2,}(?=\S)", line) if entries else None
        if word:
            key = word[1]
        text = line[word.end() :] if word else line[1:].strip()
        entries[key] = f"{entries[key]} {text}" if key in entries else text
    return entries


def stem_of(name_or_path: str) -> str:
    """A recipe's name without folders and without ``.yaml``; other dots belong to it."""
    path = Path(name_or_path)
    return path.stem if path.suffix in ENDINGS else path.name


def resolve_alias(stem: str) -> str:
    """The recipe name of an alias: recipe names leave ImageNet out."""
    return "_".join(word for word in stem.split("_") if word != LEFT_OUT)


def find(name_or_path: str, below: str = "") -> Path:
    """The file of a path or of a bare name, with or without ``.yaml``.

    Args:
        name_or_path: the path or the name.
        below: sub-folder of the recipe folders; ``sweeps`` for sweep files.

    Raises:
        PruneError: if there is none; its text names the most similar recipes, or how to write one.
    """
    trouble = path_trouble(name_or_path)
    if trouble:
        raise PruneError(f"no {'sweep' if below else 'recipe'} file there: {trouble}")
    path = Path(name_or_path)
    if path.is_file():
        return path
    stem = stem_of(name_or_path)
    # recipes were directly in a recipe folder before papers had sub-folders
    if len(path.parts) == 1 or path.parent.resolve() in [(folder / below).resolve() for folder in recipe_folders()]:
        files = _by_name(below)
        name = stem if stem in files else resolve_alias(stem)
        if len(files.get(name, [])) > 1:
            raise PruneError(
                f"{shown(name)} is the name of several files: {', '.join(map(str, files[name]))}; name one"
            )
        if name in files:
            return files[name][0]
    elif (renamed := path.with_name(f"{resolve_alias(stem)}.yaml")).is_file() and path.suffix in ("", *ENDINGS):
        return renamed
    raise PruneError(
        _no_sweep(name_or_path, known_recipes(below)) if below else _no_recipe(name_or_path, known_recipes())
    )


def suggestions(name: str, files: Mapping[str, Path]) -> tuple[list[str], list[str]]:
    """Find the recipes whose words are most like those of a name.

    The words of a recipe are those of its name, and the source and folder of its data. Rare words weigh more than
    frequent ones: backbone and method more than "cifar10".

    Args:
        name: a recipe name without ending.
        files: recipe name -> file.

    Returns:
        Names of recipes, best first, and the words of the name that no recipe has.
    """
    words_of = {recipe: [*_words(recipe), *_data_words(file)] for recipe, file in files.items()}
    frequency: dict[str, int] = {}
    for words in words_of.values():
        for word in set(words):
            frequency[word] = frequency.get(word, 0) + 1
    unknown = []
    scores = dict.fromkeys(files, 0.0)
    for position, word in enumerate(_words(name)):
        similarity = {other: _similarity(word, other) for other in frequency}
        best = max(similarity.values(), default=0)
        if best < ALIKE:
            unknown.append(word)
            continue
        least = 1.0 if best == 1.0 else ALIKE  # misspellings count only if no recipe has the word itself
        for recipe, words in words_of.items():
            likeness, rarity = max((similarity[other], 1 / frequency[other]) for other in words)
            if likeness >= least:
                is_backbone = position == 0 and _similarity(word, words[0]) >= least
                scores[recipe] += likeness + rarity + (0.5 if is_backbone else 0)
    order = sorted((r for r in files if scores[r] > 0), key=lambda r: (-scores[r], len(_words(r)), r))
    if not order:
        close = difflib.get_close_matches(name, list(files), n=1, cutoff=0.6)
        return close, [] if close else unknown
    floor = scores[order[0]] * 0.6
    return [recipe for recipe in order if scores[recipe] >= floor], unknown


def _no_recipe(name: str, files: Mapping[str, Path]) -> str:
    """The error for a recipe name without a file."""
    stem = stem_of(name)
    close, unknown = suggestions(stem, files)
    advice = "'dist-prune list recipes' shows all; how to write one: docs/recipes.md"
    if not close:
        reason = f"none of the {len(files)} recipes has a word like it" if files else "there are no recipes here"
        return (
            f"no recipe file at {shown(name)}: {reason}. {advice} (any network of timm: 'dist-prune list backbones')."
        )
    best = [repr(recipe) for recipe in close[:SHOWN]]
    more = f" ({len(close)} like it)" if len(close) > SHOWN else ""
    hint = f"Did you mean {' or '.join([', '.join(best[:-1]), best[-1]] if len(best) > 1 else best)}?{more}"
    if unknown:
        hint += f" No recipe has {' or '.join(map(shown, unknown))} in its name."
    elif not _has_all_words(stem, close[0], files):
        hint += " No recipe has all of these words."
    swap = " For another method on a recipe's network and data, add method.name=NAME to it."
    return f"no recipe file at {shown(name)}. {hint}{swap if len(_words(stem)) > 1 else ''} {advice}."


def _no_sweep(name: str, files: Mapping[str, Path]) -> str:
    """The error for a sweep name without a file."""
    close, _ = suggestions(stem_of(name), files)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"no sweep file at {shown(name)}.{hint} In recipes/sweeps: {', '.join(sorted(files)) or 'none'}"


def _has_all_words(name: str, recipe: str, files: Mapping[str, Path]) -> bool:
    words = [*_words(recipe), *_data_words(files[recipe])]
    return all(max(_similarity(word, other) for other in words) >= ALIKE for word in _words(name))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word] or [name.lower()]


def _data_words(file: Path) -> list[str]:
    """Source and folder of a recipe's data, without reading the file as YAML, which may be broken."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError):
        return []
    source = re.search(r"\bsource: *(\w+)", text)
    folder = re.search(r"\broot: *[\"']?\S*?/(\w+)[\"'}\s]", text)
    return [match.group(1).lower() for match in (source, folder) if match]


def _similarity(word: str, other: str) -> float:
    """Share of common letters, 1 for the same word; 0 for other numbers: resnet50 is not resnet56, and l1 is not l2."""
    if word == other:
        return 1.0
    if _digits(word) != _digits(other) or min(len(word), len(other)) < 4:
        return 0.0
    return difflib.SequenceMatcher(None, word, other).ratio()


def _digits(word: str) -> Iterable[str]:
    return re.findall(r"\d+", word)
