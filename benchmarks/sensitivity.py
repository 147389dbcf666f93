"""What the Sensitivity Pruner costs: a pruning update against a training update, the score of 7,552 channels, masks.

    OMP_NUM_THREADS=2 python benchmarks/sensitivity.py [--json FILE] [--only updates|scores] [--rounds 7]

Random images: no loader takes part. A plain update and a pruning update (score on the re-initialised copy, masks, loss,
SGD step) take turns; the ratio is the median of the turns' ratios.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from torch import nn
from torch.nn import functional

from dist_prune import models
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.methods.sensitivity.mask_learner import Mask, MaskLearner, MaskRules
from dist_prune.methods.sensitivity.method import Sensitivity
from dist_prune.methods.sensitivity.options import Options
from dist_prune.methods.sensitivity.single_shot import SingleShotScore
from dist_prune.methods.sensitivity.snip import Ramp, filter_scores, target_masks
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.rng import seeded_generator
from dist_prune.pruning.surgery.verified_trace import trace_groups

THREADS = int(os.environ["OMP_NUM_THREADS"])


class Alone:
    """What a round asks of a scoring context when there is one process and no data."""

    def __init__(self, model: nn.Module):
        self.model = model

    def clone_model(self) -> nn.Module:
        import copy

        return copy.deepcopy(self.model)

    def all_reduce_sum_(self, tensors: Any) -> None:
        """One process."""

    def generator(self, *name: Any) -> torch.Generator:
        return seeded_generator(0, *name)


def timed(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def updates(name: str, batch: int, options: Options, rounds: int) -> dict[str, float]:
    """Seconds of a plain training update and of a pruning update of the first round, in turns."""
    torch.manual_seed(0)
    model = models.create(name, 10, 3)
    paper, bench = Sensitivity(options), Alone(model)
    channels = paper.prunable(trace_groups(model.eval(), torch.zeros(1, 3, 32, 32)))
    groups = paper.rounds(channels)[0]
    shot = SingleShotScore(options, bench, channels, groups, 1)  # type: ignore[arg-type]
    rules = MaskRules(Ramp(1.0, 100.0, 100, 8, 390, 1.0))
    masks = [
        Mask(g.width, tuple(shot.weights[g.name].shape[2:]), rules, False, bench.generator(g.name), torch.float32)
        for g in groups
    ]
    plan = Plan({}, {g.name: g.width for g in channels.groups})
    learner = MaskLearner(bench.clone_model(), channels, plan, groups, masks).train()
    plain = bench.clone_model().train()
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch) % 10

    def step(network: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)

        def act() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return act

    def pruning_loss() -> torch.Tensor:
        inputs, targets = shot.compute(images, labels, int(learner.updates))
        for group, mask in zip(groups, masks, strict=True):
            mask.input, mask.target = inputs[group.name], targets[group.name]
        found = functional.cross_entropy(learner(images), labels) + learner.penalty()
        learner.note()
        return found

    train = step(plain, lambda: functional.cross_entropy(plain(images), labels))
    prune = step(learner, pruning_loss)
    score = lambda: shot.compute(images, labels, 0)  # noqa: E731
    turns = [[timed(act) for act in (train, prune, score)] for _ in range(rounds + 2)][2:]
    return {
        "plain_s": statistics.median(t[0] for t in turns), "pruning_s": statistics.median(t[1] for t in turns),
        "ratio": statistics.median(t[1] / t[0] for t in turns),
        "score_share": statistics.median(t[2] / t[1] for t in turns),
    }  # fmt: skip


def scores(rounds: int) -> dict[str, float]:
    """ResNet-50's 7,552 filters: the target from filter scores, sums of |g| per filter, and both by a loop."""
    model = models.create("resnet50_stem3", 10, 3)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n.endswith((".conv1", ".conv2"))]
    grads = {name: torch.randn_like(model.get_parameter(f"{name}.weight")) for name in layers}
    found = {name: filter_scores(grad) for name, grad in grads.items()}
    channels = sum(len(value) for value in found.values())

    def loop() -> None:
        limit = torch.cat(list(found.values())).kthvalue(int(0.6 * channels)).values.item()
        for grad in grads.values():
            for row in grad:
                _ = row.abs().sum().item() >= limit

    turns = [
        [
            timed(lambda: target_masks(found, 0.4, "global")),
            timed(lambda: {n: filter_scores(g) for n, g in grads.items()}),
            timed(loop),
        ]
        for _ in range(rounds + 1)
    ][1:]
    middle = [statistics.median(t[i] for t in turns) for i in range(3)]
    return {"channels": channels, "target_s": middle[0], "sums_s": middle[1], "loop_s": middle[2]}


def multiplied(rounds: int) -> dict[str, float]:
    """Forward and backward of a mask on 64x576x14x14 maps: one broadcast product, and a loop over channels."""
    maps = torch.randn(64, 576, 14, 14, requires_grad=True)
    vector = torch.rand(576, requires_grad=True)

    def broadcast() -> None:
        (maps * vector[:, None, None]).sum().backward()

    def looped() -> None:
        torch.stack([maps[:, i] * vector[i] for i in range(len(vector))], 1).sum().backward()

    turns = [[timed(broadcast), timed(looped)] for _ in range(rounds + 1)][1:]
    return {"broadcast_s": statistics.median(t[0] for t in turns), "loop_s": statistics.median(t[1] for t in turns)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the same figures here")
    parser.add_argument("--only", choices=("updates", "scores"), help="one of the two")
    parser.add_argument("--rounds", type=int, default=7, help="turns that are counted")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    machine = describe_environment(DistributedEnvironment.single_process())
    print(f"{machine['processor']}, {machine['cores']} cores, {THREADS} thread(s)")
    body: dict[str, Any] = {"machine": machine, "threads": THREADS}
    if given.only != "scores":
        vgg = Options(by="layer", pool="layers", fallback="few", total="layer", keep=0.3)
        cases = (
            ("resnet20_cifar", 128, Options(keep=0.6), "at most 2.5 times as long"),
            ("vgg16_bn_head_cifar", 12, vgg, ""),
        )
        for name, batch, options, bound in cases:
            found = body[name] = updates(name, batch, options, given.rounds)
            print(
                f"{name}, batch {batch}: pruning update {found['ratio']:.2f} times as long as a training update "
                f"({1000 * found['pruning_s']:.0f} and {1000 * found['plain_s']:.0f} ms; the score is "
                f"{found['score_share']:.0%} of it)   {bound}"
            )
    if given.only != "updates":
        found = body["scores"] = scores(given.rounds)
        print(
            f"{found['channels']} channels: target {1000 * found['target_s']:.2f} ms (at most 10 ms), sums of |g| "
            f"{1000 * found['sums_s']:.1f} ms, filter by filter {1000 * found['loop_s']:.0f} ms"
        )
        found = body["product"] = multiplied(given.rounds)
        print(f"mask of 64x576x14x14: {1000 * found['broadcast_s']:.0f} ms, in slices {1000 * found['loop_s']:.0f} ms")
    if given.json:
        given.json.write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
