"""The code of adding-a-dataset.md and adding-a-cost.md, and the package of adding-a-paper.md, taken and run."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dist_prune import methods, plugins
from dist_prune.config import loading
from dist_prune.config.pruning import Target
from dist_prune.data.datasets import DatasetKeys, open_source
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.pruning.selection.cost import COSTS
from dist_prune.run import run
from tests.support.launch import report
from tests.support.packages import OFFLINE, PIP, ROOT

QUICK = ("report.latency_repeats=1", "report.latency_batches=[1]")


def blocks(page: str) -> dict[str, str]:
    """Language -> the block of the page in it."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)
    assert len(dict(found)) == len(found)
    return dict(found)


def pip_install(package: Path, site: Path) -> None:
    done = subprocess.run([*PIP, "install", *OFFLINE, "--target", str(site), str(package)], check=False)
    assert done.returncode == 0


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path for packages; costs that they add go away again."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    costs = dict(COSTS)
    COSTS.joined = False  # type: ignore[attr-defined]
    yield place
    for name in dict(COSTS).keys() - costs.keys():
        del COSTS[name], Target.costs[name]
    for name in ("even_odd", "map_memory", "my_package", "my_package.mean_activation"):
        sys.modules.pop(name, None)
    plugins.load.cache_clear()


def test_the_data_set_runs_by_its_path_and_by_its_entry_point(site, tmp_path, monkeypatch):
    code = blocks("adding-a-dataset.md")
    package = tmp_path / "package"
    package.mkdir()
    for file, language in (("even_odd.py", "python"), ("even_odd.yaml", "yaml"), ("pyproject.toml", "toml")):
        (package / file).write_text(code[language])
    monkeypatch.chdir(package)
    recipe = loading.load("even_odd.yaml", list(QUICK), methods.options_of)
    assert run(recipe, tmp_path / "run", DistributedEnvironment.single_process()) == ""
    body = report(tmp_path / "run")
    assert body["dense"]["top1"] > 55, "even and odd digits are learnt"
    assert body["achieved"]["macs"] <= 0.6
    pip_install(package, site)
    assert plugins.names("dataset") == ["even_odd"]
    by_path, by_name = (
        open_source(source, None, "train", True, dataset=DatasetKeys({"skip": [0]}))
        for source in ("./even_odd.py:EvenOdd", "even_odd")
    )
    assert by_name.identity == by_path.identity and by_name.classes == ("even", "odd")
    assert loading.load("even_odd.yaml", ["data.source=even_odd"], methods.options_of).data.source == "even_odd"


def test_the_cost_is_a_target_after_pip_install(site, tmp_path):
    code = blocks("adding-a-cost.md")
    package = tmp_path / "package"
    package.mkdir()
    (package / "map_memory.py").write_text(code["python"])
    (package / "pyproject.toml").write_text(code["toml"])
    pip_install(package, site)
    words = (
        *QUICK, "target.macs=null", "target.map_memory=0.6", "target.tolerance=0.1", "method.name=l1", "train.epochs=1",
        "train.warmup_epochs=0", "finetune.epochs=0", "backbone.name=resnet8p_cifar",
    )  # fmt: skip
    recipe = loading.load("quickstart", list(words), methods.options_of)
    assert run(recipe, tmp_path / "run", DistributedEnvironment.single_process()) == ""
    body = report(tmp_path / "run")
    assert 0.54 < body["achieved"]["map_memory"] <= 0.6
    assert body["pruned"]["map_memory"] < body["dense"]["map_memory"]
    assert "feature maps (B) (k)" in (tmp_path / "run/report.html").read_text()


def test_the_package_of_a_paper_is_found_by_its_name(site, tmp_path):
    text = (ROOT / "docs" / "adding-a-paper.md").read_text()
    toml = re.search(r"^    \[build-system\].*?\n\n(?=\S)", text, re.M | re.S)
    assert toml
    package = tmp_path / "package"
    (package / "my_package").mkdir(parents=True)
    (package / "pyproject.toml").write_text(textwrap.dedent(toml[0]))
    (package / "my_package" / "__init__.py").touch()
    (package / "my_package" / "mean_activation.py").write_text(
        re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)[0]
    )
    pip_install(package, site)
    assert methods.find("mean_activation").__name__ == "MeanActivation"
    assert [plugin.package for plugin in plugins.installed("method")] == ["my-package 1.0"]
