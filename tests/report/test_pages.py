"""The four pages: whatever a name holds is text, nothing comes from elsewhere, nothing missing is left blank."""

import base64
import hashlib
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np
import pytest

from dist_prune.pruning.figure_data import Curve, SimilarityMap
from dist_prune.report.compare_html import TaskRuns, render_comparison
from dist_prune.report.criteria_html import render_criteria
from dist_prune.report.html import render
from dist_prune.report.papers_html import PaperRow, PaperTable, render_papers
from dist_prune.report.ratio_curves_html import render_ratio_curves
from dist_prune.report.run_html import Exhibits, render_report
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.tasks.primary import PrimaryFigure
from tests.report.test_tables import body

ROOT = Path(__file__).resolve().parents[2]
TOP1 = PrimaryFigure.of(CLASSIFICATION.description())
HOSTILE = "\"'><script src=http://elsewhere.example/x.js>alert(1)</script><img onerror=x>&{{ 7 * 7 }}"


class Page(HTMLParser):
    """The elements of a page, their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def facts_of_a_report(word: str) -> dict:
    """As much of report.json as every report has, with ``word`` wherever a text stands."""
    facts = body()
    for kind in ("dense", "pruned", "finetuned"):
        for figures in facts[kind]["latency"].values():
            figures |= {"repeats": 2, "device": word, "threads": 1}
    group = {"name": word, "layers": [word], "width": 4, "unit": "head", "kept": 2, "reason": word}
    untrained = {"epochs": 0}
    return facts | {
        "name": word, "seed": 0, "world_size": 1, "commit": word, "environment": {"processor": word},
        "recipe": {
            "backbone": {"name": word}, "method": {"name": word}, "train": untrained, "finetune": untrained,
        },
        "plan": {"fingerprint": "f" * 64, "groups": [group]}, "target": {word: 0.5}, "achieved": {word: 0.5},
        "timings": {word: 1.0}, "events": [],
    }  # fmt: skip


def report_page(word: str) -> str:
    """A report with all of its sections."""
    facts = facts_of_a_report(word) | {
        "expanded": {word: [word]}, "table": [{word: word}, {"other": 0.5}],
        "communication": {word: {word: {"calls": 1, "bytes": 5000}}},
        "many": [{"method": word, "top1": 1.0, "macs": 0.5, "params": 0.5, "overlap": {word: 1.0}}],
        "many_images": word, "events": [{"stage": word, "event": f"WARNING: {word}", word: word}],
        "network": [{"name": word, "kind": "conv", "group": word, "in": [3, 3], "out": [4, 2], "macs": [400, 200]}] * 2,
        "answers": {"finetuned": {"lost": 2, "gained": 1, "images": 6}},
        "calibration": {word: {"ece": 1.0, "bins": [{"images": 1, "confidence": 50.0, "accuracy": 60.0}]}},
        "classes": [{"class": word, "number": 0, "images": 3, "dense": 3, "pruned": 0, "finetuned": 1}],
        "confused": [{"class": word, "taken_for": word, "dense": 0, "finetuned": 2}],
    }  # fmt: skip
    histories = {word: [{"epoch": 1, "loss": 1.0, "test_top1": 1.0, "test_loss": 1.0}]}
    portrait = SimilarityMap(word, np.eye(2), np.array([0, -1]), np.array([True, False]), word)
    planes = [{"group": word, "width": "2", "kept": "1", "top1": "50", "ixz": "", "izy": "", "total_correlation": ""}]
    exhibits = Exhibits(
        histories, [portrait], [Curve(word, (0, 1), (0, 1), (word, word))], planes, [[(word, "")]], [(word, "#123456")],
        {0: [(word, "")]}, {word: np.array([[1]])}, [word],
    )  # fmt: skip
    return render_report(facts, word, exhibits)


def comparison_page(word: str) -> str:
    row = dict.fromkeys(("top1", "change", "macs", "macs_share", "params", "params_share", "ms", "speedup"), 1.0)
    row |= {"backbone": word, "method": word, "target": word, "run": word, "name": word, "seeds": 2}
    row |= {"reliable": True, "top1_std": None, "dense_top1": 1.0, "dense_ms": 1.0, "task": word}
    lines = [({**row, "seed": seed}, [word, "1"]) for seed in ("mean", "0", "1")]
    paper = {"recipe": word, "point": word, "change": -1.0, "macs_share": 0.5, "params_share": None}
    part = TaskRuns(word, word, TOP1, [word, "b"], lines)
    return render_comparison(word, [part], [paper], ["8"], [(word, [word], [[word]])])


TIMED = {"ms": 2.0, "dense_ms": 3.0, "speedup": 1.5, "reliable": True}
DOUBTED = {"ms": 2.0, "dense_ms": 4.0, "speedup": None, "reliable": False}


def timed_on(word: str) -> dict:
    return {"batch": 8, "device": word, "machine": word, "threads": 1, "repeats": 3}


def criteria_page(word: str) -> str:
    line = {"method": word, "top1": 1.0, "macs": 0.5, "params": 0.5, "overlap": {word: 1.0}}
    lines = [{**line, **TIMED}, {**line, **DOUBTED, "why": word}]
    return render_criteria(word, word, lines, CLASSIFICATION.description(), 10, word, timed_on(word))


def ratio_curves_page(word: str) -> str:
    point = {"kept": 2, "macs": 0.5, "top1": 50.0, "loss": 1.0}
    points = [{"ratio": 0.5, **point, **TIMED}, {"ratio": 0.2, **point, **DOUBTED, "why": word}]
    facts = {
        "times": timed_on(word),
        "dense": {"top1": 60.0, "loss": 1.0}, "images": 10, "where": word, "max_drop": 1.0, "keep_ratios": {word: 0.5},
        "groups": [{"group": word, "width": 4, "points": points}],
    }  # fmt: skip
    return render_ratio_curves(word, word, facts, word)


def papers_page(word: str) -> str:
    rows = [
        PaperRow("random", "", [1.0, 2.0], [3.0, 4.0], 0.5, 0.5),
        PaperRow(word, word, [5.0, 5.1], [9.0, 9.1], 0.5, 0.5),
    ]
    run = PaperTable(word, word, word, word, [9.5], word, rows)
    return render_papers([run, PaperTable(f"{word}2", word, word, word, [], "", [])], word)


def test_papers_are_compared_with_random_by_their_seeds():
    def page(*rows: PaperRow) -> str:
        return Page(render_papers([PaperTable("lenet", "p", "r", "n", [99.0], "", rows)], "it")).text

    random = PaperRow("random", "", [50.0, 52.0, 51.0], [90.0, 90.2, 90.1])
    l2 = PaperRow("l2", "", [60.0] * 3, [90.0, 90.1, 90.3])
    text = page(random, PaperRow("l1", "", [60.0] * 3, [91.0, 91.1, 91.2]), l2)
    assert "lenet: l1 is 1.00 points ahead of random." in text and "l2 is" not in text
    assert "91.10 ± 0.10" in text and "Dense: 99.00." in text
    assert "no row can be told from random" in page(random, l2)
    assert "so no difference can be told" in page(random, PaperRow("l1", "", [60.0], [95.0]))
    assert "random at the same size was not run" in page(PaperRow("l1", "", [60.0], [95.0]))


PAGES = pytest.mark.parametrize("page", [report_page, comparison_page, ratio_curves_page, criteria_page, papers_page])


@PAGES
def test_names_are_text_and_nothing_else(page):
    plain, hostile = Page(page("conv1")), Page(page(HOSTILE))
    assert hostile.elements == plain.elements and hostile.elements.count("table") > 0
    assert not {"link", "iframe", "object"} & set(hostile.elements)
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count(HOSTILE) == plain.text.count("conv1") > 3


@PAGES
def test_a_page_has_one_stylesheet_and_one_script_and_asks_nobody(page):
    text = page("conv1")
    head, found = text.partition("</head>")[0], Page(text)
    assert head.count("<style>") == 1 and "border-collapse: collapse" in head
    assert found.elements.count("script") == 1 and not [tag for tag in found.elements if tag in ("link", "iframe")]
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for name, value in found.attributes if name == "content" and "default-src" in value)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert script == (ROOT / "dist_prune/report/templates/page.js").read_text(), "nothing of a run is in the script"
    loads = [value for name, value in found.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loads)
    assert "@import" not in head and "url(" not in head


@PAGES
def test_all_pages_have_one_look(page):
    found = Page(page("conv1"))
    classes = [value for name, value in found.attributes if name == "class"]
    assert {"verdict", "cards", "panels", "legend", "table-box", "sorts"} <= set(" ".join(classes).split())
    assert found.elements.count("svg") > 0
    text = page("conv1")
    for svg in text.split("<svg")[1:]:
        assert "<title>" in svg.partition("</svg>")[0], "each picture says what it shows"


def test_a_section_without_content_is_left_out():
    sections = (
        "Similarity of channels",
        "The method's figures",
        "Criteria at the same target, nothing finetuned",
        "Communication of each rank",
        "The network",
        "Classes that lost most",
        "Calibration of confidence",
        "The same images for each network",
    )
    full, small = report_page("conv1"), render_report(facts_of_a_report("conv1"), "name: x")
    assert [f"<h2>{name}</h2>" in full for name in sections] == [True] * len(sections)
    assert not [name for name in (*sections, "Rounds", "Filled in") if name in small]


def test_a_value_that_is_missing_stops_the_page():
    with pytest.raises(jinja2.UndefinedError, match="title"):
        render("compare.html.j2", lines=[], facets=[], others=[])


def test_tables_need_neither_templates_nor_plots():
    code = "import sys, dist_prune.report.tables; sys.exit(bool({'jinja2', 'matplotlib.figure'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_criteria_of_an_error_are_ranked_and_named_by_it():
    """Of a regression the lowest RMSE is the best, with digits that tell small ones apart."""
    task = {"name": "regression", "titles": {"rmse": "RMSE"}, "primary": "rmse", "higher_is_better": False}
    lines = [
        {"method": name, "rmse": rmse, "macs": 0.5, "params": 0.5, "overlap": {"a": 1.0, "b": 1.0}}
        for name, rmse in (("a", 0.00412), ("b", 0.00398))
    ]
    page = Page(render_criteria("ink", "net", lines, task, 10, "images")).text
    assert "b leaves the best network: RMSE 0.00398." in page
    assert "RMSE (lower is better)" in page and "not measured" in page
    assert "top-1" not in page.lower() and "0.00412" in page


@pytest.mark.parametrize("page", [ratio_curves_page, criteria_page])
def test_pages_of_cut_networks_show_their_speed_up(page):
    """The largest reliable one as a figure, where it was measured, the others in doubt: hollow and a question mark."""
    text = page("cpu")
    seen = Page(text).text
    assert "largest speed-up" in seen and "1.50x" in seen and "batch 8 on cpu, 1 thread(s)" in seen
    assert "2.00x, not reliable: cpu" in seen, "the mark says so"
    assert text.count('"mark hollow"') == 1
    assert "<td>?</td>" in text or ">?</td>" in text
    assert "not measured" not in seen


def test_results_without_times_say_so():
    """Of an earlier version, or of --no-times."""
    point = {"ratio": 0.5, "kept": 2, "macs": 0.5, "top1": 50.0, "loss": 1.0}
    facts = {
        "dense": {"top1": 60.0, "loss": 1.0}, "images": 10, "where": "held out", "max_drop": 1.0, "keep_ratios": {},
        "groups": [{"group": "conv1", "width": 4, "points": [point]}],
    }  # fmt: skip
    page = render_ratio_curves("net", "l1", facts, "none")
    assert "not measured" in page and "Speed-up by keep ratio" not in page and "Hollow" not in page
    assert page.count('<figure class="panel">') == 2
