"""Parallel map: independent jobs over the ranks, all at once, in rounds with saved results, or with a result cache."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.preemption import PreemptedError
from dist_prune.distributed.result_cache import ResultCache
from dist_prune.distributed.resumable_state import ResumableState, identity_of

Run = Callable[[Any], Any]
Bar = Callable[[Sequence[Any], int], Iterable[Any]]
SAVE_S = 60.0  # seconds between two saves of the results
ROUND_S = 2.0  # seconds that a round of cached jobs should take, between two exchanges of results


def map_jobs(
    jobs: Sequence[Any],
    run: Run,
    comm: Communicator,
    bar: Bar,
    file: Path | None,
    identity: str,
    what: str,
    costs: Sequence[float] | None = None,
) -> list[Any]:
    """Run every job once, on one of the ranks, in rounds of one job per rank; a collective, called by every rank.

    Between two rounds the ranks agree whether to stop. If all results are tensors they are saved in ``file`` every
    ``SAVE_S`` seconds and when stopped. The next call reads them and runs the other jobs only.

    Args:
        jobs: the same on every rank; their ``repr`` is a part of the file's identity.
        run: job -> result; called on one rank, so it must not call collectives.
        comm: all processes.
        bar: (rounds, number of rounds) -> the rounds again, with a progress bar.
        file: the saved results, or None to save nothing.
        identity: the computation that the saved results belong to, besides these jobs.
        what: name of the call in the text of PreemptedError.
        costs: cost of each job, in any unit; expensive jobs run first.

    Returns:
        The results in the order of the jobs, on every rank; tensors are on the CPU.

    Raises:
        PreemptedError: on every rank, if one of them was asked to stop.
    """
    state = ResumableState(file, identity_of(identity, list(jobs)), comm)
    results: dict[int, Any] = {int(number): table for number, table in state.load()[0].items()}
    own: dict[int, Any] = {}
    saved_at = time.monotonic()
    missing = [number for number in range(len(jobs)) if number not in results]
    if costs is not None:
        missing.sort(key=lambda number: (-costs[number], number))

    def gather() -> None:
        for rank_results in comm.all_gather_object(own):
            results.update(rank_results)
        own.clear()
        if results and all(isinstance(result, Tensor) for result in results.values()):
            state.save({str(number): result for number, result in results.items()})

    rounds = range(0, len(missing), comm.world)
    reason = ""
    for start in bar(rounds, len(rounds)):
        due = comm.is_main and time.monotonic() - saved_at > SAVE_S
        stop, due = preemption.poll(comm, (int(due),))
        if stop or due:
            gather()
            saved_at = time.monotonic()
        if stop:
            done = f"after {len(results)} of {len(jobs)} jobs" if results else "before its first job"
            raise preemption.preempted_error(f"while scoring, in {what}, {done}")
        for number in missing[start : start + comm.world][comm.rank : comm.rank + 1]:
            try:
                own[number] = on_cpu(run(jobs[number]))
            except PreemptedError as error:  # the next poll tells the other ranks, which must not wait
                reason = str(error)
    if missing:
        gather()
    reasons = [why for why in comm.all_gather_object(reason) if why] if missing else []
    if reasons:
        raise PreemptedError(reasons[0])
    return [results[number] for number in range(len(jobs))]


def map_once(jobs: Sequence[Any], run: Run, comm: Communicator) -> list[Any]:
    """Run every job once, on one of the ranks; a collective, called by every rank.

    Args:
        jobs: the same on every rank.
        run: job -> a small result that can be pickled; called on one rank, so it must not call collectives.
        comm: all processes.

    Returns:
        The results in the order of the jobs, on every rank.

    Raises:
        PreemptedError: on every rank, if a job of one of them was asked to stop.
    """
    done, stopped = [], ""
    try:
        for number in range(comm.rank, len(jobs), comm.world):
            done.append((number, run(jobs[number])))
    except PreemptedError as error:  # the others wait for this rank's results: tell them before leaving
        stopped = str(error)
    gathered = comm.all_gather_object((done, stopped))
    reason = next((why for _, why in gathered if why), "")
    if reason:
        raise PreemptedError(reason)
    return [result for _, result in sorted((pair for pairs, _ in gathered for pair in pairs), key=lambda pair: pair[0])]


def map_cached(
    jobs: Sequence[Any],
    run: Run,
    comm: Communicator,
    cache: ResultCache,
    what: str = "score",
    round_s: float = ROUND_S,
    progress: Callable[[int, int], None] = lambda done, ran: None,
) -> list[Any]:
    """Run every job once like ``map_once``, except those with a cached result; a collective, called by every rank.

    New results are added to the cache after each round. The number of jobs per rank in a round adapts, so that a round
    takes about ``round_s`` seconds.

    Args:
        jobs: JSON values, the same on every rank.
        run: job -> result, a JSON value (tuples become lists); called on one rank, so it must not call collectives.
        comm: all processes.
        cache: the results of earlier calls.
        what: name of the work, for the text of PreemptedError.
        round_s: seconds that a round should take, between two exchanges of results.
        progress: called after each round with the number of jobs that have a result, and of those that were run now.

    Returns:
        The results in the order of the jobs, on every rank.

    Raises:
        PreemptedError: on every rank, if one of them was asked to stop; results of finished rounds are in the cache.
    """
    missing = [job for job in jobs if job not in cache]
    each, ran = 1, 0
    while missing:
        if preemption.poll(comm)[0]:
            raise preemption.preempted_error(f"in {what}, with {len(missing)} of {len(jobs)} shared jobs to do")
        now, missing = missing[: each * comm.world], missing[each * comm.world :]
        start = time.monotonic()
        cache.add(zip(now, map_once(now, run, comm), strict=True))
        done, ran = len(jobs) - len(missing), ran + len(now)
        progress(done, ran)
        slowest = comm.max_ints(int(1000 * (time.monotonic() - start)))[0] / 1000
        each = max(1, min(2 * each, int(each * round_s / max(slowest, 1e-3))))
    return [cache[job] for job in jobs]


def on_cpu(value: Any) -> Any:
    """Move the tensors of a job's result to the CPU, also those in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(inner) for inner in value)
    return value
