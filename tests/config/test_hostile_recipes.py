"""Recipes and sweeps that were damaged, or made to do harm: accepted or refused in a sentence, within a second."""

import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from dist_prune import methods
from dist_prune.cli.main import main as cli_main
from dist_prune.config import loading, safe_parsing, sweep
from dist_prune.config.recipe import Recipe
from dist_prune.errors import LONGEST_SHOWN, PruneError, shown
from tests.test_layers import ROOT

GOOD = "backbone: {name: resnet8p_cifar}\ndata: {source: digits}\nmethod: {name: l1}\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefghi", "bcdefghij", strict=True)
)
FUZZED = (
    "quickstart",
    "resnet56_cifar10_graph",
    "mlp_mnist_mint",
    "resnet56_cifar10_sensitivity",
    "vgg16_cifar10_shapley",
)
TOKENS = [
    "!!int x", "!!bool x", "!!float x", "!!int ''", "!!python/object/apply:os.system [ls]", "!!binary aGk=",
    "!!set {a}",
    "2001-99-99", "2001-01-01", "9" * 5000, "-" + "9" * 400, "0x" + "f" * 5000, ".nan", ".inf", "-.inf",
    "1e309", "1e-400", "&x [*x]", "&x {a: *x}", "*nowhere", "[" * 3000 + "]" * 3000, "{a: " * 300 + "1" + "}" * 300,
    "null", "~",
    "''", "yes", "[]", "{}", "[[[[1]]]]", "{1: 2}", "{null: 1}", "{[1]: 2}", "a" * 5000, "/" + "a" * 300,
    "'\\0'", '"\\0"',
    "${HOME}", "${NO_SUCH_VARIABLE_AT_ALL}", "${", "-1", "0", "1.5", "18446744073709551616", "1_000",
    "1:30:59",
    "<<",
    "|", "..", ".", "'a\nb'", "\u202e", "\x07", "\ufeff", "%YAML 9.9", "---", "...", "?", "? a", "@", "`", "- - - -",
]  # fmt: skip


def mutated(text: str, draw: random.Random) -> bytes:
    """A recipe's text with one to three faults in it."""
    for _ in range(draw.randint(1, 3)):
        kind, lines = draw.randrange(7), text.splitlines()
        place = draw.randrange(len(text) + 1)
        if kind == 0:
            text = text[:place] + draw.choice(TOKENS) + text[place:]
        elif kind == 1:  # another value behind a colon
            colons = [i for i, letter in enumerate(text) if letter == ":"] or [0]
            start = draw.choice(colons) + 1
            end = min(i for i in (text.find(c, start) for c in ",}\n") if i >= 0) if "\n" in text[start:] else len(text)
            text = text[:start] + " " + draw.choice(TOKENS) + text[end:]
        elif kind == 2:
            text = text[:place] + text[place + draw.randint(1, 40) :]
        elif kind == 3 and lines:  # a line twice, in another place
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
            text = "\n".join(lines) + "\n"
        elif kind == 4 and lines:
            number = draw.randrange(len(lines))
            lines[number] = " " * draw.randint(0, 9) + lines[number].lstrip()
            text = "\n".join(lines) + "\n"
        elif kind == 5:
            text = (
                text[:place] + chr(draw.choice([0, 9, 10, 13, 34, 39, 58, 91, 123, 128, 0x2028, 0xFFFF])) + text[place:]
            )
        else:
            text = text[:place]
    raw = text.encode(errors="replace")
    if draw.random() < 0.1 and raw:
        raw = bytearray(raw)  # type: ignore[assignment]
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)  # type: ignore[index]
    return bytes(raw)


def loaded(file: Path) -> tuple[Any, str]:
    """What came of a file: a recipe, or the text of a PruneError."""
    try:
        return loading.load(str(file), [], methods.options_of, need_environment=False), ""
    except PruneError as error:
        return None, str(error)


def fuzz(folder: Path, count: int) -> int:
    """Mutate recipes and load them; how many were refused. AssertionError for a hang or memory; all else is raised."""
    texts = [loading.find(name).read_text() for name in FUZZED]
    for name in FUZZED:
        assert loaded(loading.find(name))[0] is not None
    draw, refused = random.Random(17), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        file = folder / "x.yaml"
        file.write_bytes(mutated(texts[number % len(texts)], draw))
        start = time.process_time()
        spec, said = loaded(file)
        assert time.process_time() - start < 1, number
        refused += spec is None
        assert len(said) < 20_000, (number, said[:500])
        if spec is not None:
            json.dumps(spec.written(), allow_nan=False)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200
    return refused


def test_damaged_recipes_are_taken_or_refused_in_a_sentence(tmp_path):
    assert 700 < fuzz(tmp_path, 2000) < 2000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: !!int x", "'x' is no int"),
        ("train: {nesterov: !!bool x}", "'x' is no bool"),
        ("seed: 2001-99-99", "seed: Input should be a valid integer"),
        ("seed: " + "9" * 5000, "is no int"),
        ("seed: 0x" + "f" * 5000, "a whole number of about 6021 digits is too large"),
        ("select: &x {threshold: *x}", "*x is inside its own anchor"),
        ("select: " + "[" * 3000 + "]" * 3000, "nested deeper than"),
        ("select: " + "{a: " * 3000 + "1" + "}" * 3000, "nested deeper than"),
        (LAUGHS, "holds more than"),
        ("seed: 1\nseed: 2", "the key seed occurs twice"),
        ("finetune: {lr: .nan}", "finetune.lr: nan is no number"),
        ("finetune: {lr: .inf}", "finetune.lr: inf is no number"),
        ("finetune: {lr: 1e309}", "finetune.lr: Input should be a finite number"),
        ("seed: 18446744073709551616", "too large"),
        ("null: 1", "None is no name of a key"),
        ("x: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("score: {from: /" + "a" * 300 + "}", "too long for the name of a file"),
        ("select: {plan: " + "a/" * 2500 + "}", "too long for a path"),
        ("name: ..", "it cannot be dots alone"),
        ("name: .", "it cannot be dots alone"),
        ("name: " + "a" * 201, "at most 200 characters"),
        ("report: {threads: 100000}", "report.threads: Input should be less than or equal to 1024 (got 100000)"),
        ("report: {latency_batches: [-3]}", "report.latency_batches.0: Input should be greater than or equal to 1"),
        ("report: {latency_batches: [10000000]}", "report.latency_batches.0: Input should be less than or equal to"),
        ("cluster: {timeout_s: 1.0e+14}", "cluster.timeout_s: Input should be less than or equal to 1000000"),
        ("cluster: {timeout_s: 100000000000000}", "cluster.timeout_s: Input should be less than or equal to 1000000"),
        ("method: {name: entropy, bin_range: [1, 0]}\nseed: 0", "occurs twice"),
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_each_of_them_is_a_sentence_at_once(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(GOOD + text)
    start = time.process_time()
    found, error = loaded(tmp_path / "x.yaml")
    assert found is None and said in error, error
    assert time.process_time() - start < 1


def test_the_same_on_the_command_line(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(GOOD)
    for word, said in (
        ("seed=!!int x", "'x' is no int"), ("train.lr=.nan", "nan is no number"), ("a." * 3000 + "b=1", "a few parts"),
        ("seed=" + "9" * 5000, "is no int"), ("data.root=/" + "b" * 5000, "too long for a path"),
        ("data.root=" + "b" * 300, "too long for the name"), ("target=&x [*x]", "is inside its own anchor"),
    ):  # fmt: skip
        with pytest.raises(PruneError) as error:
            loading.load(str(tmp_path / "x.yaml"), [word], methods.options_of)
        assert said in str(error.value) and len(str(error.value)) < 1500
    for verb in ("check", "sweep"):
        assert cli_main([verb, "c" * 5000]) == 2
        assert "too long for a path" in capsys.readouterr().err


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"seed: \xff\xfe")
    assert "no UTF-8 text" in loaded(tmp_path / "x.yaml")[1]
    (tmp_path / "y.yaml").write_text("#" * 5_000_000)
    assert "no recipe is that long" in loaded(tmp_path / "y.yaml")[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{base: quickstart, grid: {null: [1]}}", "None is no name of a key"),
        ("{base: quickstart, grid: {5: [1]}}", "5 is no key of a recipe"),
        ("{base: quickstart, list: [{5: 1}]}", "5 is no key of a recipe"),
        ("{base: quickstart, grid: {" + ", ".join(f"k{n}: {list(range(100))}" for n in range(5)) + "}}",
         "10000000000 tasks; at most 2,000"),
        ("{base: " + "q" * 5000 + "}", "too long for a path"),
        ("{base: quickstart, grid: {seed: [!!int x]}}", "'x' is no int"),
        ("{base: quickstart, grid: &x {seed: [*x]}}", "is inside its own anchor"),
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_hostile_sweeps(tmp_path, text, said):
    (tmp_path / "s.yaml").write_text(f"tasks: [{text}]")
    start = time.process_time()
    with pytest.raises(PruneError) as error:
        sweep.load_sweep(str(tmp_path / "s.yaml"), methods.options_of)
    assert said in str(error.value), str(error.value)[:500]
    assert time.process_time() - start < 1


def test_a_sweep_that_would_name_the_folder_above(tmp_path):
    (tmp_path / "...yaml").write_text("tasks: [{base: quickstart}]")
    with pytest.raises(PruneError, match="cannot be dots alone"):
        sweep.load_sweep(str(tmp_path / "...yaml"), methods.options_of)


def test_a_task_s_folder_has_a_name_that_the_disk_takes(tmp_path):
    long = "a" * 90
    (tmp_path / "s.yaml").write_text(
        f"tasks: [{{base: quickstart, list: [{{select.exclude: [{long}1, {long}2, {long}3]}}]}}]"
    )
    (task,) = sweep.load_sweep(str(tmp_path / "s.yaml"), methods.options_of).tasks
    assert len(task.name) <= 200
    spec, place = sweep.choose_run(None, str(tmp_path / "s.yaml"), 0, [], methods.options_of)
    assert spec.name == task.name == place.name


@pytest.mark.parametrize("value", ["x" * 10_000, ["y" * 500] * 50, 10**4999, {"a": 10**5000}, b"z" * 999], ids=type)
def test_an_error_repeats_little_of_a_value(value):
    assert len(shown(value)) <= LONGEST_SHOWN


def test_no_error_repeats_a_long_word(tmp_path, capsys):
    """Whatever sentence a value stands in: paths and names that the system would take are long enough."""
    long = "/" + "/".join(["d" * 200] * 15)
    for verb, *more in (
        ["report"], ["compare"], ["plan"], ["latency"], ["export"], ["push", "./x"],
        ["import-checkpoint", "--out", "x"], ["check"], ["sweep"],
        ["score-many", "--methods", "l1,l2"], ["ratio-curves"],
    ):  # fmt: skip
        for place in ("f" * 300, "g/" * 3000, "h\0"):
            assert cli_main([verb, place, *more]) == 2, verb
            assert len(capsys.readouterr().err) < 600
    for words in (
        ["check", long], ["report", long], ["compare", long], ["check", "quickstart", f"backbone.name={'b' * 190}"],
        ["sweep", long], ["push", long, "./x"], ["latency", long],
        ["import-checkpoint", long, "--out", "x.safetensors"],
        ["check", "quickstart", f"select.exclude=[{'e' * 3000}]"], ["plan", long],
        ["score-many", "quickstart", "--methods", "m" * 999],
    ):  # fmt: skip
        assert cli_main(words) == 2
        said = capsys.readouterr().err
        assert max(map(len, said.split())) <= LONGEST_SHOWN + 10, words[:2]


@pytest.mark.parametrize("name", ["recipe", *methods.list_names()])
def test_every_number_has_bounds(name):
    """Whoever adds a key says what is too much of it."""
    model = Recipe if name == "recipe" else methods.options_of(name)
    schema = model.model_json_schema()
    open_: list[str] = []

    def walk(part: dict[str, Any], place: str) -> None:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        if part.get("type") in ("integer", "number"):
            low, high = ({f"{way}imum", f"exclusive{way.title()}imum"} & part.keys() for way in ("min", "max"))
            open_.extend([place] if not (low and high) else [])
        for key, inner in part.get("properties", {}).items():
            walk(inner, f"{place}.{key}")
        for key in ("items", "additionalProperties"):
            if isinstance(part.get(key), dict):
                walk(part[key], f"{place}[]")
        for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            for inner in part.get(key, ()):
                walk(inner, place)

    walk(schema, name)
    assert not open_
    assert model.model_config.get("allow_inf_nan") is False


def test_every_document_of_ours_is_within_the_bounds():
    for file in [*(ROOT / "recipes").rglob("*.yaml")]:
        safe_parsing.read_yaml(file)
