"""A tiny training on however many real ranks a launcher starts; the first one prints a digest of the weights.

Beside it stands what DDP itself handed to its collectives, counted by a hook, and what the run's account says.
"""

import json
from collections import Counter

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from dist_prune.distributed.communicator import shutdown
from dist_prune.distributed.environment import DistributedEnvironment
from tests.training.test_training import digest, still, trainer

SEEN: Counter[str] = Counter()


def watched(machine: DistributedEnvironment):
    """``machine.wrap`` with hooks that count the gradients of DDP's buckets and the buffers it sends around."""
    wrap = machine.wrap

    def wrapped(model):
        found = wrap(model)
        if not isinstance(found, DistributedDataParallel):
            return found

        def reduce(group, bucket):
            SEEN["gradients"] += bucket.buffer().numel() * bucket.buffer().element_size()
            return allreduce_hook(group, bucket)

        send = found._distributed_broadcast_coalesced

        def copied(tensors, *more):
            SEEN["buffers"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return send(tensors, *more)

        found.register_comm_hook(None, reduce)
        found._distributed_broadcast_coalesced = copied
        return found

    return wrapped


if __name__ == "__main__":
    machine = DistributedEnvironment.start()
    found = still(trainer(machine.comm))
    found.loop.environment = machine
    machine.wrap = watched(machine)  # type: ignore[method-assign]
    found.run()
    if machine.comm.is_main:
        counted = {word: size for word, (_, size) in machine.comm.volume.items()}
        body = {"world": machine.comm.world, "digest": digest(found.model), "seen": SEEN, "counted": counted}
        print(json.dumps(body))
    shutdown(machine.comm)
