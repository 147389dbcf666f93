"""The same tiny training through DeepSpeed (as the launcher says) and plain torch; prints how far they are apart.

accelerate launch --config_file launch/cpu_1_zero2.yaml tests/support/zero_once.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dist_prune.data.loader import ImageLoader
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.training.trainer import Trainer
from tests.support import tiny
from tests.training.test_training import Killed, kill_after, trainer

CASES = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "lr": 0.002},
    "rich": {
        "ema": 0.99,
        "mixup": 0.2,
        "label_smoothing": 0.1,
        "clip_grad": 1.0,
        "accumulate": 2,
        "lr_scales": {"layer1.*": 0.5},
    },
}  # fmt: skip
MASKED = "layer1.0.conv1.weight"


def made(machine: DistributedEnvironment, folder: Path | None = None, epochs: int = 1, **more) -> Trainer:
    """A training in float32 with a small learning rate, so that rounding is not blown up."""
    found = trainer(None, folder, **{"lr": 0.01, "epochs": epochs, "save_every_steps": 2, **more})
    found.model = tiny.network().float()
    found.loop.environment = machine
    feed = found.loop.loader
    found.loop.loader = ImageLoader(feed.source, feed.transform, machine.device)
    mask = torch.ones_like(found.model.get_parameter(MASKED))
    mask[::2] = 0
    found.masks = {MASKED: mask}
    return found


def apart(one: Trainer, other: Trainer) -> float:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def main(folder: Path) -> None:
    machine, plain = DistributedEnvironment.start(), DistributedEnvironment.single_process()
    found: dict = {"zero": machine.zero_stage}
    for case, more in CASES.items():
        here, there = made(machine, **more), made(plain, **more)
        here.run(), there.run()
        found[case] = apart(here, there)
        found[f"{case} masked"] = float((here.model.get_parameter(MASKED)[::2]).abs().max())
    # killed under ZeRO, gone on under ZeRO; killed under ZeRO, gone on without
    for name, second in (("resumed", machine), ("resumed without", plain)):
        here = made(machine, folder / name)
        kill_after(here, 5)
        try:
            here.run()
        except Killed:
            here.checkpoints.wait()
        again = made(second, folder / name)
        again.run()
        there = made(machine)
        there.run()
        found[name] = apart(again, there)
        found["moved"] = apart(there, made(plain))
        found[f"{name} at"] = again.resumed
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
