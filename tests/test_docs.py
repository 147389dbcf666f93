"""The documents: links resolve, commands are valid, tables match the code, the example works.

``python -m tests.test_docs`` writes the generated tables of docs/.
"""

import ast
import inspect
import itertools
import re
import runpy
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.papers_parts import tables as paper_tables
from benchmarks.which_parts import tables as study_tables
from dist_prune import methods
from dist_prune.cli.main import main
from dist_prune.config import loading
from dist_prune.config import sweep as sweeps
from dist_prune.distributed.communicator import Communicator
from dist_prune.methods.base import Method, MethodOptions, ScoringContext
from dist_prune.pipeline import runner
from tests.contracts import test_laws as laws
from tests.support import api_page
from tests.support.launch import SMALL, report, run
from tests.test_layers import ALLOWED, INSIDE_PRUNING, imports_of, room_of

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *DOCS, *(ROOT / "slurm").glob("*.md"), ROOT / "examples/README.md"])
MARKS = ("<!-- generated -->", "<!-- /generated -->")
PAPERS = ROOT / "dist_prune" / "methods"
OWN = [name for name in methods.list_names() if (PAPERS / f"{name}.py").is_file() or (PAPERS / name).is_dir()]
HISTORY = {"CHANGELOG", "LOG", "RESULTS"}  # they name files as they were
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def keys() -> str:
    """Every key of a recipe, then those of each method that no other has."""
    common = set(loading.reference(MethodOptions, "method.").splitlines()[2:])
    parts = [loading.reference(), "## Keys of the methods"]
    for name in OWN:
        rows = loading.reference(methods.options_of(name), "method.").splitlines()
        if own := [row for row in rows[2:] if row not in common]:
            parts += [f"### `{name}`", "\n".join([*rows[:2], *own])]
    return "\n\n".join(parts) + "\n"


# The folders of the package in the order in which a run meets them.
FLOW = (
    ".",
    "cli",
    "config",
    "pipeline",
    "stages",
    "data",
    "data/ffcv",
    "models",
    "distributed",
    "tasks",
    "training",
    "pruning",
    "pruning/graph",
    "pruning/hooks",
    "pruning/plan",
    "pruning/selection",
    "pruning/surgery",
    "pruning/repair",
    "pruning/information",
    "methods",
    "methods/graph",
    "methods/mint",
    "methods/sensitivity",
    "methods/entropy",
    "methods/dirichlet",
    "methods/shapley",
    "scoring",
    "export",
    "report",
    "analysis",
)


def rooms() -> str:
    """Who may import whom, as tests/test_layers.py holds it: from the lowest room to the highest."""
    parts = ["## Who may import whom"]
    for title, allowed in (("room", ALLOWED), ("room of `pruning/`", INSIDE_PRUNING)):
        lines = [f"| {title} | may import |\n|---|---|"]
        for room, others in allowed.items():
            below = " ".join(f"`{other}`" for other in allowed if other in others)
            lines.append(f"| `{room}` | {below or 'none of the others'} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def files() -> str:
    """Every file of the package with the first sentences of its docstring, a table for each folder."""
    package = ROOT / "dist_prune"
    stages = [runner.MODULES.get(stage.name, stage.name) for stage in runner.ORDER]
    folders = {str(file.parent.relative_to(package)) for file in package.rglob("*.py")}
    parts = []
    for folder in sorted(folders, key=lambda name: (FLOW.index(name) if name in FLOW else len(FLOW), name)):
        modules = sorted((package / folder).glob("*.py"))
        if folder == "stages":
            modules.sort(key=lambda file: (stages.index(file.stem) if file.stem in stages else -1, file.stem))
        lines = ["| file | content |\n|---|---|"]
        for file in modules:
            first = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0]
            caption = " ".join(first.split()).replace("|", "\\|").replace("``", "`")
            lines.append(f"| `{file.name}` | {caption} |")
        parts += [f"## {(Path('dist_prune') / folder).as_posix()}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def architecture() -> str:
    """The generated part of docs/architecture.md."""
    return f"{rooms()}\n\n{files()}"


def study() -> str:
    """The tables of the study of methods, from its compact file."""
    return study_tables.markdown(study_tables.load(ROOT / "benchmarks/results/which_method.json")) + "\n"


def paper_rows() -> str:
    """The tables of the papers' rows, from their compact file."""
    return paper_tables.markdown(paper_tables.load(ROOT / "benchmarks/results/papers.json")) + "\n"


GENERATED = {
    ROOT / "docs" / "recipes.md": keys,
    ROOT / "docs" / "architecture.md": architecture,
    ROOT / "docs" / "api.md": api_page.page,
    ROOT / "docs" / "which-method.md": study,
    ROOT / "docs" / "papers.md": paper_rows,
}


def regenerate(page: Path) -> str:
    """The page with its generated part written anew."""
    head, rest = page.read_text().split(MARKS[0])
    return f"{head}{MARKS[0]}\n\n{GENERATED[page]()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def test_every_folder_has_its_place_in_the_flow():
    package = ROOT / "dist_prune"
    assert {str(file.parent.relative_to(package)) for file in package.rglob("*.py")} == set(FLOW)


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.name)
def test_generated_parts_match_the_code(page):
    assert page.read_text() == regenerate(page), "write it anew: python -m tests.test_docs"


def test_the_recipe_and_the_sweep_of_the_reference_load(tmp_path):
    text = (ROOT / "docs" / "recipes.md").read_text()
    recipe, sweep = (re.search(rf"^    {word}:.*?\n\n", text, re.M | re.S) for word in ("name", "tasks"))
    assert recipe and sweep
    for name, example, load in (("mine", recipe, loading.load), ("several", sweep, sweeps.load_sweep)):
        (tmp_path / f"{name}.yaml").write_text(textwrap.dedent(example[0]))
        load(str(tmp_path / f"{name}.yaml"), options_of=methods.options_of, need_environment=False)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@every_page
def test_links_lead_somewhere(page):
    text = re.sub(r"^    .*$|`[^`\n]*`(?!\])", "", page.read_text(), flags=re.M)  # not in code
    for target in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        target = "".join(target)
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in {slug(line.lstrip("#")) for line in file.read_text().splitlines() if line[:1] == "#"}, (
                target
            )


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.stem not in HISTORY], ids=lambda page: str(page.relative_to(ROOT))
)
def test_named_files_exist(page):
    """Paths in backticks that name a folder are files of the package or of the repository."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for path in re.findall(r"`((?:[\w.]+/)+[\w.]+\.py)[`:]", text):
        if "mean_activation" not in path and not path.startswith("./"):  # the example's own; a user's
            assert (ROOT / path).is_file() or (ROOT / "dist_prune" / path).is_file(), f"{page.name}: {path}"


def test_the_glossary_has_every_term_once_in_order():
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "glossary.md").read_text(), re.M)[2:]
    assert len(rows) >= 30
    assert rows == sorted(set(rows))


def test_the_tree_of_the_readme_has_every_folder():
    tree = (ROOT / "README.md").read_text().partition("## The code\n")[2].partition("\n## ")[0]
    top = set(re.findall(r"^    (\w+)/ ", tree, re.M))
    assert top >= {"dist_prune", "recipes", "tests", "docs"}
    assert all((ROOT / name).is_dir() for name in top)
    assert set(re.findall(r"^      (\w+)/ ", tree, re.M)) == {room.split("/")[0] for room in FLOW} - {"."}


def test_the_functions_of_the_scoring_context_are_named_right():
    section = (ROOT / "docs" / "adding-a-paper.md").read_text().partition("## 3.")[2].partition("\n## ")[0]
    tables = [re.findall(r"^\| (`.*?) \|", table, re.M) for table in section.split("Optional parts of a method:")]
    for lines, owner in zip(tables, (ScoringContext, Method), strict=True):
        names = {name for line in lines for name in re.findall(r"`(\w+)", line)}
        assert len(names) >= 8
        assert names <= {*dir(owner), *getattr(owner, "__annotations__", {})}


def test_the_readme_names_every_document_and_every_method():
    text = (ROOT / "README.md").read_text()
    assert not [file.name for file in DOCS if f"](docs/{file.name})" not in text]
    table = (ROOT / "docs" / "methods.md").read_text()
    assert not [name for name in OWN if f"`{name}`" not in text or f"\n| `{name}` |" not in table]


@pytest.mark.parametrize("words", [("--methods", "l1", "seed=1"), ("seed=1", "--methods", "l1")])
def test_keys_come_before_or_after_options(words, capsys):
    assert main(["score-many", "quickstart", *words]) == 2
    assert "two or more" in capsys.readouterr().err, "parsed correctly, and refused for its one method"
    with pytest.raises(SystemExit):
        main(["score-many", "quickstart", *words, "--nodes", "2"])


def test_measured_figures_are_in_the_results():
    section = (ROOT / "README.md").read_text().partition("## Measured\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    figures = re.findall(r"\d+\.\d+", "\n".join(rows))
    assert len(figures) > 20
    known = set(re.findall(r"\d+\.\d+", (ROOT / "RESULTS.md").read_text()))
    assert not set(figures) - known


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in an indented line; without comments and the brackets of optional words."""
    for line in page.read_text().replace("\\\n", " ").splitlines():
        if re.match(r"    (dist-prune|accelerate launch|torchrun|python) ", line):
            line = re.sub(r"\[(-.*?|\w+=\w+.*?)\](?=\s|$)", r"\1", re.sub(r"\s# .*", "", line))
            try:
                yield shlex.split(line)
            except ValueError:  # the first line of a script
                continue


@pytest.mark.parametrize("page", [p for p in PAGES if any(commands(p))], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_valid(page, capsys):
    """Verbs and options exist, recipes and sweeps load with their keys, launch files exist."""
    for words in commands(page):
        if words[0] == "dist-prune":
            with pytest.raises(SystemExit) as ended:
                main([words[1], "--help"])
            assert ended.value.code == 0, words
            known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, words
        following = dict(itertools.pairwise(words))
        if (recipe := following.get("--recipe", "RECIPE")) != recipe.upper() and "/" not in recipe:
            keys = [word for word in words[words.index("--recipe") :] if re.match(r"[\w.]+=", word)]
            loading.load(recipe, keys, methods.options_of, need_environment=False)
        for option, load in (("--sweep", sweeps.load_sweep), ("--array", sweeps.load_sweep), ("--config_file", None)):
            name = following.get(option, "")
            if name and name != name.upper():
                assert (ROOT / name).is_file() if load is None else load(name, need_environment=False).tasks, words


NAME = "mean_activation"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The folder of the three files in docs/adding-a-paper.md: the method, its test, its recipe."""
    folder = tmp_path_factory.mktemp("example")
    text = (ROOT / "docs" / "adding-a-paper.md").read_text()
    blocks = re.findall(r"^```\w+\n(.*?)^```$", text, re.M | re.S)
    for file, content in zip((f"{NAME}.py", f"test_{NAME}.py", f"digits_{NAME}.yaml"), blocks, strict=True):
        (folder / file).write_text(content)
    return folder


def install_example(_ranks: Communicator, folder: str) -> None:
    """A method's file in ``folder`` is found as if it were in dist_prune/methods."""
    methods.__path__.append(folder)


def remove_example(_ranks: Communicator, folder: str) -> None:
    methods.__path__.remove(folder)
    sys.modules.pop(f"{methods.__name__}.{NAME}", None)


@pytest.fixture
def installed(example, pool):
    """The example's method is installed in this process and on all ranks."""
    pool.run(3, install_example, str(example))
    install_example(Communicator(), str(example))
    yield NAME
    remove_example(Communicator(), str(example))
    pool.run(3, remove_example, str(example))


def test_the_example_of_a_paper_passes_the_contract_tests(example, installed, pool, tmp_path):
    rooms = {room_of(module) for module in imports_of(example / f"{NAME}.py")} - {None}
    assert rooms <= ALLOWED["methods"] | {"methods"}
    runpy.run_path(str(example / f"test_{NAME}.py"))[f"test_means_of_{NAME}"]()
    passed = 0
    for word, law in vars(laws).items():
        wanted = set(inspect.signature(law).parameters) if word.startswith("test_") else set()
        if wanted and wanted <= {"name", "pool"}:
            law(**{key: value for key, value in (("name", installed), ("pool", pool)) if key in wanted})
            passed += 1
    assert passed >= 12
    laws.test_killed_in_scoring_and_resumed_is_never_killed(installed, 2, 2, 3, tmp_path, pool)


@pytest.mark.slow
def test_the_recipe_of_the_example_runs(example, tmp_path):
    head = f"import sys; from dist_prune import methods, run; methods.__path__.append({str(example)!r}); "
    words = ("--recipe", str(example / f"digits_{NAME}.yaml"), "--run-dir", str(tmp_path / "run"), *SMALL)
    code, output = run((sys.executable, "-c", head + "sys.exit(run.main(sys.argv[1:]))"), None, *words)
    assert code == 0, output
    assert 0.3 < report(tmp_path / "run")["achieved"]["macs"] <= 0.55


if __name__ == "__main__":
    for file in GENERATED:
        file.write_text(regenerate(file))
