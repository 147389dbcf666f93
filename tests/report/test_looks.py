"""The four pages on a telephone, a tablet and a wide screen, light and dark: nothing cut off, small or faint."""

import json
import re

import pytest

from dist_prune.cli.main import main
from tests.report.test_pages import comparison_page, criteria_page, papers_page, ratio_curves_page, report_page
from tests.support.browser import browser
from tests.support.launch import PYTHON, SMALL, run
from tests.support.page_checks import faults

pytestmark = pytest.mark.browser
WIDTHS = (360, 768, 1400)
LONG = "encoder.stages.3.blocks.11.mlp_token_mixer.fc1_of_a_network_with_long_names"
QUICK = (*SMALL, "train.epochs=1", "finetune.epochs=1", "report.trackers=[]")


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("window")) as found:
        yield found


def believe(file):
    """Call a report's times reliable: two passes of a busy machine are no news here."""
    body = json.loads(file.read_text())
    for kind in ("dense", "pruned", "finetuned"):
        for times in body[kind]["latency"].values():
            times |= {"reliable": True}
    file.write_text(json.dumps(body))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name of a page -> its file: real ones of small runs, and ones whose every name is long."""
    folder = tmp_path_factory.mktemp("pages")
    for number, words in enumerate((("target.macs=0.5",), ("target.macs=0.7",), ("target.macs=0.7", "seed=1"))):
        code, output = run(PYTHON, folder / f"runs/{number}", *QUICK, *words)
        assert code == 0, output
        believe(folder / f"runs/{number}/report.json")
    code, output = run(PYTHON, folder / "runs/failed", *QUICK, "target.macs=0.00001")
    assert code == 2, output
    assert main(["compare", str(folder / "runs"), "--out", str(folder / "compare")]) == 0
    again = ["quickstart", "--run-dir", str(folder / "runs/0"), *QUICK, "target.macs=0.5"]
    assert main(["ratio-curves", *again, "--ratios", "0.75,0.5,0.25", "--images", "50"]) == 0
    assert (
        main(["score-many", *again[:1], "--run-dir", str(folder / "many"), *again[3:], "--methods", "l1,taylor,fpgm"])
        == 0
    )
    found = {
        "report": folder / "runs/0/report.html",
        "compare": folder / "compare/compare.html",
        "ratio curves": folder / "runs/0/ratio_curves.html",
        "score-many": folder / "many/criteria.html",
    }
    for name, page in (
        ("report", report_page), ("compare", comparison_page), ("ratio curves", ratio_curves_page),
        ("score-many", criteria_page), ("papers", papers_page),
    ):  # fmt: skip
        found[f"long {name}"] = folder / f"long {name}.html"
        found[f"long {name}"].write_text(page(LONG))
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_small_or_faint(pages, window, width, dark):
    window.look(width, dark=dark)
    for name, page in pages.items():
        window.open(page.as_uri())
        assert window.run("return innerWidth") == width
        background = window.run("return getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") != dark
        assert faults(window) == [], f"{name}, closed"
        window.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert faults(window) == [], f"{name}, open"
        assert not window.errors(), name


def test_the_checks_find_what_they_look_for(window, tmp_path):
    """Each fault once: a page that is too wide, text that is cut off, small, faint, over other text."""
    (tmp_path / "bad.html").write_text(
        "<!doctype html><body style='background: white'><p style='width: 900px; height: 1px; margin: 0'></p>"
        "<p style='width: 50px; overflow: hidden; white-space: nowrap'>cut off by its box</p>"
        "<p style='width: 50px; white-space: nowrap'>leaves its box to the right</p>"
        "<p style='font-size: 9px'>small</p><p style='color: #aaa'>faint</p>"
        "<svg width=50 height=50><text x=40 y=20>outside</text><text x=38 y=20>above</text></svg>"
    )
    window.look(360)
    window.open((tmp_path / "bad.html").as_uri())
    found = " ".join(faults(window))
    for fault in (
        "too wide",
        "cut off",
        "leaves its box",
        "text of 9 px",
        "contrast 2.32",
        "labels touch",
        "without a title",
    ):
        assert fault in found, fault


def test_printed_pages_are_light_and_whole(pages, window):
    window.look(768, dark=True, media="print")
    for name, page in pages.items():
        window.open(page.as_uri())
        assert window.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)", name
        boxes = window.run(
            "return [...document.querySelectorAll('.table-box')].map((b) => getComputedStyle(b).overflow)"
        )
        assert set(boxes) == {"visible"}, name
        assert window.run("return [...document.querySelectorAll('.tools')].every((t) => !t.getClientRects().length)"), (
            name
        )


def test_tables_sort_and_filter(pages, window):
    window.look(1400)
    window.open(pages["compare"].as_uri())
    rows = "[...document.querySelectorAll('table.sorts tbody')][0].rows"
    names = f"return [...{rows}].filter((r) => r.getClientRects().length).map((r) => r.cells[0].textContent)"
    assert window.run(names) == ["graph 0.5", "graph 0.7"]
    head = "[...document.querySelectorAll('table.sorts thead th')].find((h) => h.textContent.startsWith('MACs kept'))"
    window.run(f"{head}.click()")
    assert window.run(names) == ["graph 0.5", "graph 0.7"], "fewest first"
    window.run(f"{head}.click()")
    assert window.run(names) == ["graph 0.7", "graph 0.5"]
    assert window.run(f"return {head}.getAttribute('aria-sort')") == "descending"
    window.open(pages["long report"].as_uri())
    window.open(pages["report"].as_uri())
    window.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    typed = (
        "const t = [...document.querySelectorAll('.tools.of-table')].find((t) => "
        "t.nextElementSibling.textContent.includes('MACs left')); const i = t.querySelector('input');"
        "i.value = 'layer2 conv1'; i.dispatchEvent(new Event('input'));"
        "return [...t.nextElementSibling.querySelectorAll('tbody tr')].filter((r) => r.getClientRects().length)"
        ".map((r) => r.cells[0].textContent)"
    )
    assert window.run(typed) == ["layer2.0.conv1"]


POINTS = (
    """return [...document.querySelectorAll('.panel')][0].querySelectorAll('g[data-method]:not([hidden])').length"""
)


def choose(window, name: str, value: str) -> None:
    window.run(
        f"const s = document.querySelector('.tools.of-page select[name={name}]'); s.value = {json.dumps(value)};"
        "s.dispatchEvent(new Event('change', {bubbles: true}))"
    )


def test_runs_are_filtered_by_target_and_seed(pages, window):
    window.look(1400)
    window.open(pages["compare"].as_uri())
    assert window.run(POINTS) == 2
    fronts = "return [...document.querySelectorAll('.front')].map((f) => f.getAttribute('d'))"
    assert all(window.run(fronts)[:1]), "the script draws the front that the page came with"
    choose(window, "target", "macs 0.7")
    assert window.run(POINTS) == 1
    assert not any(window.run(fronts)), "a single point has no front"
    choose(window, "target", "")
    choose(window, "seed", "1")
    assert window.run(POINTS) == 1, "one recipe alone was run with the second seed"
    rows = "return [...document.querySelectorAll('tr[data-method]:not([hidden])')].map((r) => r.cells[0].textContent)"
    assert window.run(rows) == ["graph 0.7 seed 1"]


def test_the_script_draws_the_fronts_that_the_page_has(pages, window):
    """Server and script agree: the paths before and after the script's first call are the same numbers."""
    source = pages["compare"].read_text()
    before = re.findall(r'class="front [^"]*" d="([^"]*)"', source)
    window.look(1400)
    window.open(pages["compare"].as_uri())
    after = window.run("return [...document.querySelectorAll('.front')].map((f) => f.getAttribute('d'))")
    assert len(before) == len(after) == 6

    def numbers(path: str) -> list[float]:
        return [float(n) for n in re.findall(r"-?[\d.]+", path)]

    assert [numbers(path) for path in before] == [numbers(path) for path in after]
