"""Reports of runs that segment, detect, and keep features, in a browser: their pages are as whole as a classifier's."""

import pytest
import torch

from dist_prune import models
from dist_prune.cli.main import main
from dist_prune.distributed import tensor_files
from dist_prune.report.plots import pareto
from tests.e2e import test_run_detection, test_run_features, test_run_segmentation
from tests.support import boxes, ink, masks
from tests.support.browser import browser
from tests.support.launch import PYTHON, SMALL, report, run
from tests.support.page_checks import faults

pytestmark = pytest.mark.browser
SHORT = ("finetune.epochs=1", "score.images=8", "report.trackers=[]")


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("window")) as found:
        yield found


def segmentation(folder):
    masks.write(folder / "camvid", count=23)
    network = models.create("unet", masks.CLASSES, 3, kwargs=test_run_segmentation.NETWORK)
    return network, test_run_segmentation.WORDS, test_run_segmentation.words(folder)


def detection(folder):
    boxes.write(folder / "camvid", count=13)
    network = models.create(f"torchvision:{boxes.SSD}", 2, 3, kwargs={"width_mult": 0.25})
    return network, test_run_detection.WORDS, test_run_detection.words(folder)


def features(folder):
    masks.write(folder / "photographs", count=21)
    words = (*test_run_features.WORDS, f"data.root={folder}/photographs")
    network = models.create("features:mobilenetv3_small_050", 1, 3)
    return network, words, {"recipe": "mobilenetv2_tower_taylor", "DIST_PRUNE_DATA": str(folder)}


@pytest.mark.parametrize(
    ("made", "heads", "absent"),
    [
        (segmentation, {"Classes that lost most", "The same images for each network"}, {"Calibration of confidence"}),
        (detection, {"The same images for each network"}, {"Classes that lost most", "Calibration of confidence"}),
        (features, set(), {"Classes that lost most", "The same images for each network"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_page_of_another_task_is_whole(window, tmp_path, made, heads, absent):
    torch.manual_seed(0)
    network, words, where = made(tmp_path)
    tensor_files.save_tensors(tmp_path / "dense.safetensors", network.state_dict())
    code, output = run(
        PYTHON, tmp_path / "run", *words, *SHORT, f"backbone.checkpoint={tmp_path}/dense.safetensors", **where
    )
    assert code == 0, output
    body = report(tmp_path / "run")
    for width, dark in ((360, True), (768, False), (1400, True)):
        window.look(width, dark=dark)
        window.open((tmp_path / "run/report.html").as_uri())
        window.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert faults(window) == []
        assert not window.errors()
    shown = set(window.run("return [...document.querySelectorAll('h2')].map((h) => h.textContent)"))
    assert {"Figures", "The network", "Groups", "Why nothing was cut", *heads} <= shown and not shown & absent
    columns = window.run("return document.querySelectorAll('.skyline .layer').length")
    assert columns == len([layer for layer in body["network"] if layer["macs"][0]]) > 20
    cards = window.run("return [...document.querySelectorAll('.card dt')].map((c) => c.textContent)")
    primary = body["task"]["titles"][body["task"]["primary"]]
    assert primary in cards and "top-1 %" not in cards


def test_a_comparison_of_tasks_is_whole(window, tmp_path, capsys):
    """A section for each task; the script draws the front of an error as its lower edge, as the page came."""
    torch.manual_seed(0)
    network, words, where = segmentation(tmp_path)
    tensor_files.save_tensors(tmp_path / "dense.safetensors", network.state_dict())
    runs = tmp_path / "runs"
    checkpoint = f"backbone.checkpoint={tmp_path}/dense.safetensors"
    code, output = run(PYTHON, runs / "masks", *words, *SHORT, checkpoint, **where)
    assert code == 0, output
    recipe = ink.write(tmp_path / "ink")
    for target in (0.8, 0.6, 0.4):
        ink.prune(recipe, runs / f"ink_{target}", *ink.WORDS, f"target.macs={target}")
    ink.prune("quickstart", runs / "digits", *SMALL, *ink.WORDS)
    assert main(["compare", str(runs), "--out", str(tmp_path / "out"), "--batch", "1"]) == 0
    capsys.readouterr()
    for width, dark in ((360, True), (768, False), (1400, True)):
        window.look(width, dark=dark)
        window.open((tmp_path / "out/compare.html").as_uri())
        assert faults(window) == []
        assert not window.errors()
    titles = window.run("return [...document.querySelectorAll('h2')].map((h) => h.textContent)")
    assert {"unet, segmentation", "resnet8p_cifar, regression", "resnet8p_cifar, classification"} <= set(titles)
    assert {"Runs, segmentation: mIoU %", "Runs, regression: RMSE (lower is better)"} <= set(titles)
    axes = window.run("return [...document.querySelectorAll('.panel .y')].map((one) => one.textContent)")
    assert {"mIoU %", "RMSE (lower is better)", "top-1 %"} <= set(axes)
    fronts = window.run(
        "return [...document.querySelectorAll('[data-lower]')].map((panel) => [panel.dataset.better, "
        "panel.querySelector('.front')?.getAttribute('d') ?? '', "
        "[...panel.querySelectorAll('[data-front]:not([hidden])')].map((m) => m.dataset.front.split(' ').map(Number))])"
    )
    assert len(fronts) == 6
    assert any(len(marks) == 3 for _, _, marks in fronts)
    for better, path, marks in fronts:
        lower = pareto([(x, -y) for x, y in marks], better, higher_is_better=False)  # pixels grow downwards
        corners = [tuple(map(float, corner.split())) for corner in path.removeprefix("M").split("L")] if path else []
        assert corners == ([(x, -y) for x, y in lower] if len(lower) > 1 else [])
    window.run(
        "const one = document.querySelector('select[name=task]'); one.value = 'regression';"
        "one.dispatchEvent(new Event('change', {bubbles: true}))"
    )
    shown = window.run(
        "return [...document.querySelectorAll('[data-facet]')].filter((s) => !s.hidden).map((s) => s.dataset.task)"
    )
    assert shown == ["regression"]
