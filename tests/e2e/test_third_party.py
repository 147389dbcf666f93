"""Packages of third parties, really installed: network, data set, method and cost in one run, and by the library."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ACCELERATE, PYTHON, ROOT, TORCHRUN, environment, report, run
from tests.support.packages import PLUGINS, install

RECIPE = str(PLUGINS / "all_four.yaml")
LIBRARY = """
import sys
import torch
import dist_prune as dp
from their_dataset import TheirDigits
from their_network.nets import TheirNet

class Pixels(torch.utils.data.Dataset):
    def __init__(self): self.digits = TheirDigits(train=True)
    def __len__(self): return 90
    def __getitem__(self, index):
        image, label = self.digits[index]
        return torch.from_numpy(image)[None] / 255, label

torch.manual_seed(0)
model = TheirNet(in_chans=1)
graph = dp.trace(model, (1, 8, 8))
scores = dp.score(model, graph, "their_range", Pixels())
plan = dp.select(scores, graph, target={"their_memory": 0.5})
small = dp.prune(model, plan)
count = lambda net: sum(m.out_channels for m in net.modules() if isinstance(m, torch.nn.Conv2d))
print("plan", plan.fingerprint, count(model), count(small), flush=True)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> str:
    """A PYTHONPATH of the four packages and of this repository."""
    return f"{install(tmp_path_factory.mktemp('site'))}:{ROOT}"


def lists(site: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dist_prune.cli", *words],
        env=environment(PYTHONPATH=site), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_the_library_takes_the_method_and_the_cost(site, tmp_path):
    (tmp_path / "library.py").write_text(LIBRARY)
    code, output = run((sys.executable, str(tmp_path / "library.py")), None, PYTHONPATH=site)
    assert code == 0, output
    before, after = map(int, output.split()[-2:])
    assert after < 0.7 * before


@pytest.mark.slow
def test_lists_show_where_things_come_from(site):
    assert "their_range" in (methods := lists(site, "list", "methods")) and "[their-method 1.2]" in methods
    backbones = lists(site, "list", "backbones", "their*").splitlines()
    assert backbones == ["their_net  [their-network 1.2]", "their_timm_net  [their-network 1.2]"]
    assert "their_dataset:TheirDigits  [their-dataset 1.2]" in lists(site, "list", "datasets")
    assert "feature maps to keep  [their-cost 1.2]" in lists(site, "list", "targets")
    assert "their_memory" in lists(site, "check", RECIPE)


@pytest.mark.slow
def test_a_run_on_two_ranks_with_all_four(site, tmp_path):
    code, output = run(ACCELERATE, tmp_path / "run", recipe=RECIPE, PYTHONPATH=site)
    assert code == 0, output
    body = report(tmp_path / "run")
    assert body["world_size"] == 2 and body["target"] == {"their_memory": 0.6}
    assert 0.45 < body["achieved"]["their_memory"] <= 0.6
    assert {(p["kind"], p["name"], p["distribution"], p["version"]) for p in body["environment"]["plugins"]} == {
        ("backbone", "their_net", "their-network", "1.2"), ("backbone", "with_timm", "their-network", "1.2"),
        ("dataset", "their_digits", "their-dataset", "1.2"), ("method", "their_range", "their-method", "1.2"),
        ("cost", "their_memory", "their-cost", "1.2"),
    }  # fmt: skip
    page = (tmp_path / "run/report.html").read_text()
    assert "their-method 1.2" in page and "<td>feature maps (B) (k)</td>" in page
    load = f"import dist_prune; print(dist_prune.load({str(tmp_path / 'run/export')!r}))"
    assert "TheirNet" in run((sys.executable, "-c", load), None, PYTHONPATH=site)[1]
    without = run((sys.executable, "-c", load), None, PYTHONPATH=str(ROOT))[1]
    assert "unknown backbone 'their_net'" in without


@pytest.mark.slow
def test_the_module_s_network_runs_too_and_the_library_on_two_ranks_gives_the_plan_of_one(site, tmp_path):
    words = ("backbone.name=their_timm_net", "backbone.kwargs=", "finetune.epochs=0")
    code, output = run(PYTHON, tmp_path / "run", *words, recipe=RECIPE, PYTHONPATH=site)
    assert code == 0, output
    (tmp_path / "library.py").write_text(LIBRARY)
    script = str(tmp_path / "library.py")
    alone = run((sys.executable, script), None, PYTHONPATH=site)[1]
    code, output = run((*TORCHRUN[:-1], script), None, PYTHONPATH=site)
    assert code == 0, output
    lines = [line for line in output.splitlines() if line.startswith("plan")]
    assert len(lines) == 2 and set(lines) == {line for line in alone.splitlines() if line.startswith("plan")}


def test_the_packages_are_as_a_third_party_writes_them():
    """They import what is public, and pip finds them by their own pyproject.toml."""
    for package in ("their_network", "their_dataset", "their_method", "their_cost"):
        folder = Path(PLUGINS, package)
        assert (folder / "pyproject.toml").is_file() and (folder / package / "__init__.py").is_file()
        assert "tests" not in "".join(file.read_text() for file in folder.rglob("*.py"))
