"""docs/api.md: every public function has an example, and every example runs; types hold in a user's file."""

import inspect
import subprocess
import sys

import pytest

import dist_prune
from tests.support import api_page
from tests.support.launch import ROOT, environment


def test_every_example_runs():
    assert not api_page.failures()


def test_every_public_function_and_class_of_data_has_an_example():
    functions = {name for name in api_page.ORDER if inspect.isfunction(getattr(dist_prune, name))}
    assert functions | {"Plan", "DependencyGraph", "ChannelGroup", "HookPoint", "RankingMethod"} <= {
        *api_page.examples()
    }


USER = '''
"""A user's file: the five lines, and a method of their own."""

import torch
from torch import Tensor, nn

import dist_prune as dp


class Position(dp.RankingMethod):
    paper = "a control"

    def score(self, context: dp.ScoringContext) -> dict[str, Tensor]:
        return {group.name: torch.arange(group.width).double() for group in context.graph.free}


def halve(model: nn.Module, loader: list[tuple[Tensor, Tensor]]) -> nn.Module:
    graph: dp.DependencyGraph = dp.trace(model, (3, 32, 32), protect=["conv1"])
    scores = dp.score(model, graph, "taylor", loader)
    other = dp.score(model, graph, Position(Position.Options()))
    plan: dp.Plan = dp.select(scores, graph, target={"macs": 0.5}, round_to=8)
    widths: dict[str, int] = {group.name: group.width for group in graph.free}
    print(widths, other, plan.fingerprint, dp.costs(graph, plan)["macs"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    small = dp.prune(model, plan)
    optimizer = dp.carry(optimizer, plan)
    dp.save(small, plan, "folder")
    return dp.load("folder", model=lambda: model)
'''


@pytest.mark.slow
def test_types_hold_under_pyright_strict(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "include": ["user.py"]}')
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    found = subprocess.run(
        command, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False
    )
    errors = [line for line in found.stdout.splitlines() if " error: " in line]
    assert found.returncode == 0, "\n".join(errors)
