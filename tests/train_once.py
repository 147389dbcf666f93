"""A tiny training on however many real ranks a launcher starts; the first one prints a digest of the weights."""

import json

from dist_prune.runtime.collectives import leave
from dist_prune.runtime.machine import Machine
from tests.runtime.test_training import digest, still, trainer

if __name__ == "__main__":
    machine = Machine.start()
    found = still(trainer(machine.ranks))
    found.loop.machine = machine
    found.run()
    if machine.ranks.first:
        print(json.dumps({"world": machine.ranks.world, "digest": digest(found.model)}))
    leave(machine.ranks)
