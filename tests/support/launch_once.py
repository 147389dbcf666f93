"""A tiny float32 training as a launcher starts it; prints what the weights became and what was overridden.

launcher... tests/support/launch_once.py FOLDER [UPDATES: end after so many, as if killed]
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dist_prune.data.loader import ImageLoader
from dist_prune.distributed.environment import DistributedEnvironment
from tests.support import tiny
from tests.training.test_training import Killed, digest, kill_after, trainer


def main(folder: Path, updates: int) -> None:
    machine = DistributedEnvironment.start()
    found = trainer(None, folder, epochs=1, save_every_steps=2, clip_grad=5.0)
    found.model = tiny.network().float()
    found.loop.environment = machine
    found.loop.loader = ImageLoader(
        found.loop.loader.source, found.loop.loader.transform, machine.device, dtype=torch.float32
    )
    if updates:
        kill_after(found, updates)
    try:
        found.run()
    except Killed:
        assert found.checkpoints is not None
        found.checkpoints.wait()
    body = {"digest": digest(found.model), "overridden": machine.overridden, "resumed": found.resumed}
    print("FOUND " + json.dumps(body), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int((*sys.argv[2:], "0")[0]))
