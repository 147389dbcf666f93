"""What a method declares to need is what it asks of a real context: images, labels, gradients, training, passes."""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dist_prune import methods
from dist_prune.methods import base
from dist_prune.methods.needs import WEIGHTS_ALONE, Needs
from dist_prune.scoring.context import DistributedScoringContext
from tests.support import tiny

IMAGES = 20


class Watched:
    """Counts what a method asks of a context, and the images and backward passes that follow."""

    def __init__(self, context: DistributedScoringContext, stack: ExitStack):
        self.labels = self.gradients = self.training = False
        self.images = self.backward = 0
        kind = type(context)
        plain_labels = kind.labels.fget
        plain_grad, plain_backward = torch.autograd.grad, torch.autograd.backward

        def labels(inner: Any) -> torch.Tensor:
            self.labels = True
            return plain_labels(inner)

        def count(call: Any):
            def counted(*arguments: Any, **more: Any):
                self.gradients, self.backward = True, self.backward + 1
                return call(*arguments, **more)

            return counted

        def marks(name: str, **fields: bool):
            call = getattr(kind, name)

            def marked(inner: Any, *arguments: Any, **more: Any):
                if name != "collect" or more.get("backward") or True in arguments[2:3]:
                    for field, value in fields.items():
                        setattr(self, field, value)
                return call(inner, *arguments, **more)

            stack.enter_context(patch.object(kind, name, marked))

        stack.enter_context(patch.object(kind, "labels", property(labels)))
        stack.enter_context(patch.object(torch.autograd, "grad", count(plain_grad)))
        stack.enter_context(patch.object(torch.autograd, "backward", count(plain_backward)))
        marks("collect", labels=True)  # a gradient of the cross-entropy reads the labels
        marks("count_correct", labels=True)
        marks("train_parameters", labels=True, training=True)
        marks("train_model", labels=True, training=True)
        first = next(module for module in context.model.modules() if isinstance(module, torch.nn.Conv2d))
        stack.callback(first.register_forward_hook(self._count).remove)

    def _count(self, _module: Any, inputs: Any, _output: Any) -> None:
        self.images += len(inputs[0])


@pytest.mark.parametrize("name", methods.list_names())
def test_declared_is_what_is_asked(name):
    method = tiny.method(name)
    needs = method.needs
    assert needs is not None
    context = tiny.bench(tiny.network(), images=IMAGES, micro_batch=10)
    with ExitStack() as stack:
        seen = Watched(context, stack)
        method.score(context)
    looked = seen.images > 0 or seen.training  # a training may work on a copy of the network
    assert (looked, seen.labels, seen.gradients, seen.training) == (
        needs.images, needs.labels, needs.gradients, needs.training,
    )  # fmt: skip
    if needs.forward is not None:
        assert seen.images == IMAGES * needs.forward
    if needs.backward is not None:
        assert seen.backward == needs.backward * IMAGES / 10
    assert (needs.forward is None or needs.backward is None) <= bool(needs.note)


def test_a_method_of_another_package_inherits():
    class Theirs(base.WeightRanking):
        paper = "theirs"

        def filter_scores(self, filters: torch.Tensor) -> torch.Tensor:
            return filters.sum(1)

    class Silent(base.RankingMethod):
        paper = "silent"

        def score(self, context: base.ScoringContext) -> base.Scores:
            return {}

    assert Theirs.needs is WEIGHTS_ALONE
    assert Silent.needs is None


def test_the_cost_is_in_forward_passes():
    assert Needs(forward=2, backward=3).cost == "8"
    assert Needs(forward=1, note="and more").cost == "1 (and more)"
    assert Needs(forward=None, note="epochs").cost == "epochs"
    assert Needs(backward=None).cost == "depends on the options"
