"""The pages as a person sees them: opened in Chromium, no error in its log, plots with something in them.

The photographs stay in pytest's temporary folder, or in the folder that DIST_PRUNE_SHOTS names.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dist_prune.cli.main import main
from tests.support.browser import browser, free_port, photograph, until_served
from tests.support.launch import ACCELERATE, ROOT, SMALL, environment, run

pytestmark = pytest.mark.browser
INK = "/* shapes with an extent */ (s) => { const b = s.getBBox(); return b.width + b.height > 1; }"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three small runs of two ranks in one folder, as a sweep leaves them: two targets, one of them by two seeds."""
    root = tmp_path_factory.mktemp("pages") / "runs"
    for name, words in (
        ("quickstart-macs_0.5", ("target.macs=0.5",)),
        ("quickstart-macs_0.7", ("target.macs=0.7",)),
        ("quickstart-macs_0.7-seed_1", ("target.macs=0.7", "seed=1")),
    ):
        code, output = run(ACCELERATE, root / name, *SMALL, *words)
        assert code == 0, output
    return root


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    folder = Path(os.environ.get("DIST_PRUNE_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    with browser(folder) as found:
        yield found


@pytest.fixture(scope="module")
def tensorboard(runs):
    """The one command of the README, on a free port."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", str(port)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until_served(f"http://127.0.0.1:{port}/", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def shapes(window) -> list[int]:
    """For each SVG of the page, the number of its paths that cover something."""
    return window.run(
        f"const ink = {INK};"
        "return [...document.querySelectorAll('svg')].map((s) => [...s.querySelectorAll('path')].filter(ink).length)"
    )


def overflow(window) -> int:
    """Pixels by which the page is wider than its window."""
    return window.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_the_report(runs, window):
    window.open((runs / "quickstart-macs_0.5" / "report.html").as_uri())
    assert window.run("return document.querySelector('h1').textContent") == "quickstart"
    window.shot("report")
    plots = window.run(f"const ink = {INK}; return [...document.querySelectorAll('.panel svg')].map((s) => "
                       "[...s.querySelectorAll('path')].filter(ink).length)")  # fmt: skip
    assert len(plots) == 5 and min(plots) > 3, "calibration, loss and accuracy of two trainings"
    columns = window.run("return [...document.querySelectorAll('.skyline rect')].map((r) => r.getBBox().height)")
    assert len(columns) == 20 and min(columns) > 0, "ten layers, before and after"
    pictures = window.run(
        "return [...document.querySelectorAll('.gallery:not(.small) img')].map((i) => i.naturalWidth)"
    )
    assert len(pictures) == 6 and min(pictures) > 0, "a portrait of each group that can be cut"
    assert overflow(window) <= 0
    assert not window.errors()


def test_the_readme_s_picture_can_be_made_again(runs, window, tmp_path):
    photograph(window, runs / "quickstart-macs_0.5" / "report.html", tmp_path / "report.png", 1080, 925)
    with Image.open(tmp_path / "report.png") as made, Image.open(ROOT / "docs" / "images" / "report.png") as there:
        assert made.size == there.size == (1080, 925)
        assert len(made.convert("RGB").getcolors()) > 8, "text, lines and bars, not one colour"
    assert (tmp_path / "report.png").stat().st_size < 300_000


def test_the_comparison(runs, window, tmp_path, capsys):
    assert main(["compare", str(runs), "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    window.open((tmp_path / "compare.html").as_uri())
    window.shot("compare")
    assert len(window.run("return [...document.querySelectorAll('.panel svg')]")) == 6, (
        "a cost each, the time, relative"
    )
    assert min(shapes(window)) > 0
    cells = window.run(
        "return [...document.querySelectorAll('table.sorts tbody tr')].filter((r) => !r.hidden).map((r) => "
        "[...r.cells].map((c) => c.textContent))"
    )
    assert [row[1] for row in cells] == ["1", "2"], "two targets, the second by two seeds"
    assert [row[0] for row in cells] == ["graph 0.5", "graph 0.7"]
    titles = window.run("return [...document.querySelectorAll('.panel g title')].map((t) => t.textContent)")
    assert any(title.startswith("quickstart (quickstart-macs_0.5)") for title in titles), "a pointer reads the run"
    assert overflow(window) <= 0
    assert not window.errors()


def test_an_error_of_a_page_is_seen(window, tmp_path):
    """The tests above can fail: a page that throws, a page without ink."""
    window.look_freely()
    (tmp_path / "bad.html").write_text("<!doctype html><svg></svg><script>throw new Error('broken')</script>")
    window.open((tmp_path / "bad.html").as_uri())
    assert shapes(window) == [0]
    assert "broken" in window.errors()[0]


def tab(window, tensorboard: str, name: str) -> None:
    window.open(f"{tensorboard}/?{name}#{name}")  # the words before the hash make the browser load it anew


def test_tensorboard_scalars(tensorboard, window):
    tab(window, tensorboard, "scalars")
    lines = """
      return found.filter((e) => e.tagName === 'TF-SCALAR-CARD').filter((card) =>
        [...card.shadowRoot.querySelectorAll('*')].length > 0).length
    """
    assert window.wait(lines, "cards of scalars") >= 4
    drawn = (
        "const ink = {INK}; return found.filter((e) => e.tagName === 'path' && /^M.*L/.test(e.getAttribute('d') || '')"
    )
    window.wait(f"{drawn.replace('{INK}', INK)} && ink(e)).length > 20", "lines in the plots")
    window.shot("scalars")
    assert not window.errors()


def test_tensorboard_hparams(tensorboard, window):
    tab(window, tensorboard, "hparams")
    window.wait("return found.some((e) => e.textContent.trim() === 'target.macs')", "a key of the recipe")
    names = "[...new Set(found.map((e) => e.textContent.trim()).filter((t) => t.startsWith('quickstart-macs_')))]"
    rows = window.wait(f"const r = {names}; return r.length >= 3 && r", "three runs")
    assert {row.split("/")[0] for row in rows} >= {"quickstart-macs_0.5", "quickstart-macs_0.7-seed_1"}
    window.shot("hparams")
    assert not window.errors()


def test_tensorboard_images(tensorboard, window):
    tab(window, tensorboard, "images")
    window.wait(
        "const i = found.filter((e) => e.tagName === 'IMG'); return i.length > 2 && i.every((e) => e.naturalWidth > 9)",
        "pictures of three runs",
    )
    window.shot("images")
    assert not window.errors()


def test_tensorboard_text(tensorboard, window):
    tab(window, tensorboard, "text")
    window.wait(
        "return found.filter((e) => e.tagName === 'TD' && e.textContent === 'layer3.0.conv1').length >= 3", "plans"
    )
    window.shot("text")
    assert not window.errors()
