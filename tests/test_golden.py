"""Plans that must not move unless a change is meant to move them and says so.

``python -m tests.test_golden`` prints the new fingerprints for golden/plans.json.
"""

import json
from pathlib import Path

import pytest

from dist_prune import methods
from dist_prune.pruning.selection.ranking import SelectionRequest
from tests.support import tiny

FILE = Path(__file__).parent / "golden" / "plans.json"
NETWORKS = {"resnet8p_cifar": {}, "resnet20_cifar": {"name": "resnet20_cifar"}}


def fingerprints() -> dict[str, str]:
    found = {}
    for label, arguments in NETWORKS.items():
        bench = tiny.bench(tiny.network(**arguments))
        for name in methods.list_names():
            method = tiny.method(name)
            plan = method.select(method.score(bench), bench.graph, SelectionRequest(target=("macs", 0.6)))
            found[f"{name} on {label}"] = plan.fingerprint
    return found


@pytest.fixture(scope="module")
def found():
    return fingerprints()


@pytest.mark.parametrize("case", [f"{name} on {label}" for label in NETWORKS for name in methods.list_names()])
def test_golden_plan(case, found):
    assert found[case] == json.loads(FILE.read_text()).get(case), "the plan moved: meant? then update golden/plans.json"


if __name__ == "__main__":
    print(json.dumps(fingerprints(), indent=1))
