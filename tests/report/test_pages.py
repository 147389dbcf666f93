"""The three pages: whatever a name holds is text, nothing comes from elsewhere, nothing missing is left blank."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np
import pytest

from dist_prune.pruning.figure_data import Curve, SimilarityMap
from dist_prune.report.compare_html import render_comparison
from dist_prune.report.html import render, render_report
from dist_prune.report.ratio_curves_html import render_ratio_curves
from tests.report.test_tables import body

ROOT = Path(__file__).resolve().parents[2]
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
    }  # fmt: skip
    histories = {word: [{"epoch": 1, "loss": 1.0, "test_top1": 1.0, "test_loss": 1.0}]}
    portrait = SimilarityMap(word, np.eye(2), np.array([0, -1]), np.array([True, False]), word)
    planes = [{"group": word, "width": "2", "kept": "1", "top1": "50", "ixz": "", "izy": "", "total_correlation": ""}]
    return render_report(facts, histories, word, [portrait], [Curve(word, (0, 1), (0, 1), (word, word))], planes)


def comparison_page(word: str) -> str:
    row = dict.fromkeys(("top1", "change", "macs", "macs_share", "params", "params_share", "ms", "speedup"), 1.0)
    row |= {"backbone": word, "reliable": True, "top1_std": None, "dense_top1": 1.0, "dense_ms": 1.0}
    return render_comparison(word, [(word, [word, "b"], [[word, "1"]])], [row], [], "8")


def ratio_curves_page(word: str) -> str:
    points = [{"ratio": 0.5, "kept": 2, "macs": 0.5, "top1": 50.0, "loss": 1.0}]
    facts = {
        "dense": {"top1": 60.0, "loss": 1.0}, "images": 10, "where": word, "max_drop": 1.0, "keep_ratios": {word: 0.5},
        "groups": [{"group": word, "width": 4, "points": points}],
    }  # fmt: skip
    return render_ratio_curves(word, word, facts, word)


PAGES = pytest.mark.parametrize("page", [report_page, comparison_page, ratio_curves_page])


@PAGES
def test_names_are_text_and_nothing_else(page):
    plain, hostile = Page(page("conv1")), Page(page(HOSTILE))
    assert hostile.elements.count("table") == plain.elements.count("table") > 0
    assert not {"script", "link", "iframe", "object"} & set(hostile.elements)
    assert hostile.elements.count("img") == plain.elements.count("img")
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count(HOSTILE) == plain.text.count("conv1") > 3


@PAGES
def test_a_page_has_one_stylesheet_and_asks_nobody(page):
    text = page("conv1")
    head = text.partition("</head>")[0]
    assert head.count("<style>") == 1 and "border-collapse: collapse" in head
    assert not [tag for tag in Page(text).elements if tag in ("script", "link", "iframe")]
    loads = [value for name, value in Page(text).attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loads)
    assert "@import" not in head and "url(" not in head


def test_a_section_without_content_is_left_out():
    sections = (
        "Similarity of channels",
        "The method's figures",
        "Criteria at the same target, nothing finetuned",
        "Communication of each rank",
    )
    full, small = report_page("conv1"), render_report(facts_of_a_report("conv1"), {}, "name: x")
    assert [f"<h2>{name}</h2>" in full for name in sections] == [True] * 4
    assert not [name for name in (*sections, "Rounds", "Filled in") if name in small]


def test_a_value_that_is_missing_stops_the_page():
    with pytest.raises(jinja2.UndefinedError, match="title"):
        render("compare.html.j2", tables=[], recipes=0, plots="")


def test_tables_need_neither_templates_nor_plots():
    code = "import sys, dist_prune.report.tables; sys.exit(bool({'jinja2', 'matplotlib.figure'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
