"""Where recipes lie, and which one a name means: aliases, and suggestions by a name's words. Knows no torch."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from dist_prune.errors import PruneError, path_trouble, shown

LEFT_OUT = "imagenet"  # the data set that recipe names leave out; a name that says it is the same recipe
SWEEPS = "sweeps"  # the folder of sweep files among those of recipes
ENDINGS = (".yaml", ".yml")
ALIKE = 0.75  # words with this share of common letters are taken for the same one, misspelt
SHOWN = 4


def recipe_folders() -> list[Path]:
    """Where a bare recipe name is looked for, in order."""
    here = Path(__file__).resolve().parents[1]
    return [Path("recipes"), here.parent / "recipes", here / "recipes"]


def known_recipes(below: str = "") -> dict[str, Path]:
    """Every name that can be written bare, and its file; ``below`` is ``sweeps`` for those."""
    return {name: files[0] for name, files in _by_name(below).items()}


def _by_name(below: str) -> dict[str, list[Path]]:
    """Bare name -> its files in the first recipe folder that has any. Recipes lie there or in folders, one a paper."""
    out: dict[str, list[Path]] = {}
    for folder in recipe_folders():
        files: dict[str, list[Path]] = {}
        inner = [] if below else [file for file in folder.glob("*/*.yaml") if file.parent.name != SWEEPS]
        for file in sorted([*(folder / below).glob("*.yaml"), *inner]):
            files.setdefault(file.stem, []).append(file)
        out = files | out
    return out


def stem_of(name_or_path: str) -> str:
    """The name without folders and without its ending; other dots belong to it."""
    path = Path(name_or_path)
    return path.stem if path.suffix in ENDINGS else path.name


def resolve_alias(stem: str) -> str:
    """The name that an alias stands for: ImageNet is left out of recipe names."""
    return "_".join(word for word in stem.split("_") if word != LEFT_OUT)


def find(name_or_path: str, below: str = "") -> Path:
    """The file of a path or of a bare name, with or without ``.yaml``.

    Raises:
        PruneError: there is none; with the recipes whose words are nearest, or how to write one.
    """
    trouble = path_trouble(name_or_path)
    if trouble:
        raise PruneError(f"no {'sweep' if below else 'recipe'} file there: {trouble}")
    path = Path(name_or_path)
    if path.is_file():
        return path
    stem = stem_of(name_or_path)
    # a path right in a recipe folder is that of a recipe before recipes lay in folders
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
    """(recipes that share most of the name's words, best first; words of the name that no recipe has).

    A word that few recipes have says more than one that many have: backbone and method before "cifar10". Words are the
    parts of the recipe's name, and what its file says of its data: source and folder.
    """
    words = {recipe: [*_words(recipe), *_told(file)] for recipe, file in files.items()}
    spread: dict[str, int] = {}
    for held in words.values():
        for word in set(held):
            spread[word] = spread.get(word, 0) + 1
    asked, strange = _words(name), []
    score = dict.fromkeys(files, 0.0)
    for place, word in enumerate(asked):
        likeness = {other: _alike(word, other) for other in spread}
        best = max(likeness.values(), default=0)
        if best < ALIKE:
            strange.append(word)
            continue
        least = 1.0 if best == 1.0 else ALIKE  # a misspelling only where nothing has the word itself
        for recipe, held in words.items():
            found = max((likeness[other], 1 / spread[other]) for other in held)
            if found[0] >= least:
                first = 0.5 if place == 0 and _alike(word, held[0]) >= least else 0  # its backbone
                score[recipe] += found[0] + found[1] + first
    order = sorted((r for r in files if score[r] > 0), key=lambda r: (-score[r], len(_words(r)), r))
    if not order:
        whole = difflib.get_close_matches(name, list(files), n=1, cutoff=0.6)
        return whole, [] if whole else strange
    floor = score[order[0]] * 0.6
    return [recipe for recipe in order if score[recipe] >= floor], strange


def _no_recipe(given: str, files: Mapping[str, Path]) -> str:
    stem = stem_of(given)
    close, strange = suggestions(stem, files)
    own = "'dist-prune list recipes' shows all; how to write one: docs/recipes.md"
    if not close:
        what = f"none of the {len(files)} recipes has a word like it" if files else "there are no recipes here"
        return f"no recipe file at {shown(given)}: {what}. {own} (any network of timm: 'dist-prune list backbones')."
    best = [repr(name) for name in close[:SHOWN]]
    more = f" ({len(close)} like it)" if len(close) > SHOWN else ""
    hint = f"Did you mean {' or '.join([', '.join(best[:-1]), best[-1]] if len(best) > 1 else best)}?{more}"
    if strange:
        hint += f" No recipe has {' or '.join(map(shown, strange))} in its name."
    elif not _covers(stem, close[0], files):
        hint += " No recipe has all of these words."
    swap = " Another method on a recipe's network and data: method.name=NAME behind it."
    return f"no recipe file at {shown(given)}. {hint}{swap if len(_words(stem)) > 1 else ''} {own}."


def _no_sweep(given: str, files: Mapping[str, Path]) -> str:
    close, _ = suggestions(stem_of(given), files)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"no sweep file at {shown(given)}.{hint} In recipes/sweeps: {', '.join(sorted(files)) or 'none'}"


def _covers(name: str, recipe: str, files: Mapping[str, Path]) -> bool:
    held = [*_words(recipe), *_told(files[recipe])]
    return all(max(_alike(word, other) for other in held) >= ALIKE for word in _words(name))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word] or [name.lower()]


def _told(file: Path) -> list[str]:
    """What a recipe's file says of its data, without reading it as YAML: it may be broken."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError):
        return []
    source = re.search(r"\bsource: *(\w+)", text)
    folder = re.search(r"\broot: *[\"']?\S*?/(\w+)[\"'}\s]", text)
    return [found.group(1).lower() for found in (source, folder) if found]


def _alike(word: str, other: str) -> float:
    """1 for the same word. Numbers are names, not spelling: resnet50 is not resnet56, and l1 is not l2."""
    if word == other:
        return 1.0
    if _digits(word) != _digits(other) or min(len(word), len(other)) < 4:
        return 0.0
    return difflib.SequenceMatcher(None, word, other).ratio()


def _digits(word: str) -> Iterable[str]:
    return re.findall(r"\d+", word)
