"""Real gloo ranks, started once per test session: worlds 1, 2, 3 (and more) are groups of the same processes."""

import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PATIENCE_S = 240


class Pool:
    """``run(world, function, *arguments)`` calls the function on ranks 0 .. world - 1; results in rank order.

    The function is a module's own (it is sent by name) and takes ``ranks`` first. ``worlds`` are those that ``run``
    may ask for (default: all up to ``size``).
    """

    def __init__(self, size: int, folder: Path, worlds: Sequence[int] = ()):
        context = multiprocessing.get_context("spawn")
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, tuple(worlds) or range(2, size + 1), f"file://{folder}/rendezvous", theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        pipes = self.pipes[:world]
        for pipe in pipes:
            pipe.send((world, function, arguments))
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(PATIENCE_S):
                raise AssertionError(f"rank {rank} of {world} did not answer within {PATIENCE_S} s")
            ok, value = pipe.recv()
            if not ok:
                raise AssertionError(f"rank {rank} of {world} raised:\n{value}")
            results.append(value)
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def _serve(
    rank: int, size: int, worlds: Sequence[int], place: str, pipe: multiprocessing.connection.Connection
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    from dist_prune.distributed.communicator import Communicator

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size)
    groups = {world: dist.new_group(list(range(world))) for world in worlds}
    while True:
        world, function, arguments = pipe.recv()
        try:
            ranks = Communicator() if world == 1 else Communicator.of(groups[world])
            pipe.send((True, function(ranks, *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
