"""The same bounds on a real GPU, by torch's own warnings of synchronisations: what the pretend device counts is so."""

import pytest
import torch

from tests.device import traffic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
BED = traffic.Bed(kind="cuda")


def test_torch_tells_of_synchronisations():
    with traffic.watched("cuda") as found:
        torch.ones(3, device="cuda").sum().item()
    assert found.syncs == 1


@pytest.mark.parametrize("settings", [{}, {"augment": "crop_flip"}, {"ema": 0.9}, {"clip_grad": 1.0}], ids=str)
def test_a_training_step_waits_once(settings):
    found = traffic.training(BED, **settings)
    assert found.syncs <= 1, found.waits


@pytest.mark.parametrize("name", traffic.QUIET)
def test_scoring_waits_for_nothing(name):
    found = traffic.scoring(BED, name)
    assert found.syncs == 0, found.waits


def test_evaluation_waits_for_no_batch():
    found = traffic.evaluation(BED)
    assert found.syncs == 0, found.waits
