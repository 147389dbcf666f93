"""How often the host waits for the device, and what goes between them: per step, micro-batch and evaluation batch.

    python benchmarks/device_traffic.py [--network resnet20_cifar] [--size 8] [--batch 4] [--device cuda] [--json FILE]

Needs no GPU: a pretend device (tests/support/pretend_device.py) counts what a GPU would be waited for; on a GPU
(--device cuda) torch's own warnings of synchronisations are counted, and nothing else. A synchronisation is what
those warnings name: a value read, a copy to the host, a copy to the device that is waited for, a mask or nonzero
whose size has to be known; and a decomposition that looks whether it came to an end. Figures are slopes: what one
more batch costs; what is done once, or behind the last batch, is not in them. The steps of sensitivity and dirichlet
are those of all their trainings, which run one after another. Images are noise.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dist_prune import methods
from tests.device import traffic
from tests.device.traffic import Bed, Each

STEPS = {
    "the loop": {}, "crop and flip": {"augment": "crop_flip"}, "averaged weights": {"ema": 0.9},
    "mixup": {"mixup": 0.2}, "cutmix": {"cutmix": 1.0}, "distillation": {"beside": "distillation"},
    "clipping": {"clip_grad": 1.0}, "two pieces": {"accumulate": 2}, "channels_last": {"channels_last": True},
    "masks": {"beside": "masks"}, "sparse: bn_scale": {"beside": "bn_scale"},
    "sparse: group_norm": {"beside": "group_norm"}, "skip_nonfinite": {"skip_nonfinite": 1},
    "bf16": {"precision": "bf16"}, "fp16": {"precision": "fp16"},
}  # fmt: skip
GRADIENTS = ("fisher", "group_fisher", "hessian_trace", "obd", "taylor")  # beside a forward and a backward pass
OPTIONS = {"shapley": {"samples": 3}, "sensitivity": {"epochs": 1}, "dirichlet": {"epochs": 1}}
OWN = ("sensitivity", "dirichlet", "entropy", "hrel")  # batches of their own: as large as a micro-batch here


def rows(bed: Bed) -> Iterator[tuple[str, str, Each, Each | None]]:
    """(kind, what, its figures, those of the bare loop beside it)."""
    bare = traffic.bare_training(bed)
    yield "training", "bare loop", bare, None
    for what, settings in STEPS.items():
        yield "training", what, traffic.training(bed, **settings), bare
    forward, both = traffic.bare_forward(bed), traffic.bare_forward(bed, True)
    yield "scoring", "bare forward", forward, None
    yield "scoring", "bare forward and backward", both, None
    for name in methods.list_names():
        options = OPTIONS.get(name, {}) | ({"batch": bed.batch} if name in OWN else {})
        found = traffic.scoring(bed, name, **options)
        yield "scoring", name, found, both if name in GRADIENTS else forward
    yield "evaluation", "evaluate", traffic.evaluation(bed), forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--network", default=Bed.name)
    parser.add_argument("--size", type=int, default=Bed.size, help="side of the images")
    parser.add_argument("--batch", type=int, default=Bed.batch, help="images of a step, micro-batch, evaluation batch")
    parser.add_argument("--json", type=Path, help="write the same figures here")
    parser.add_argument(
        "--device", default="pretend", choices=("pretend", "cuda"), help="cuda: syncs alone are counted"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    bed, body = Bed(given.network, given.size, given.batch, kind=given.device), []
    print(f"{bed.name}, {bed.size}x{bed.size}, {bed.batch} images a batch; per step, micro-batch or evaluation batch\n")
    print("| | | syncs | bytes up | bytes down | operations | beside bare | the host waited for |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, what, each, bare in rows(bed):
        body.append({"kind": kind, "what": what, **asdict(each)})
        ratio = f"{each.operations / bare.operations:.2f}x" if bare and bare.operations and each.operations else ""
        waits = ", ".join(f"{name} {count:g}" for name, count in each.waits.items())
        cells = (kind, what, f"{each.syncs:g}", f"{each.up:,.0f}", f"{each.down:,.0f}", f"{each.operations:,.0f}")
        print("|", " | ".join((*cells, ratio, waits)), "|", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"network": bed.name, "size": bed.size, "batch": bed.batch, "rows": body}))


if __name__ == "__main__":
    main()
