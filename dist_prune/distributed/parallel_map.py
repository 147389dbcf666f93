"""Independent jobs over the ranks: dealt out once, or in rounds with every result put on record."""

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
SAVE_S = 60.0  # between two saves of what shared jobs have brought so far
ROUND_S = 2.0  # about so long between two looks at what the other ranks have done


def map_jobs(
    jobs: Sequence[Any], run: Run, comm: Communicator, bar: Bar, file: Path | None, identity: str, what: str,
    costs: Sequence[float] | None = None,
) -> list[Any]:  # fmt: skip
    """Every job once, on some rank, in rounds of one per rank; the results in the order of the jobs, on all ranks.

    Between rounds the ranks hear whether they are to stop. Results that are tensors are kept in ``file`` from time to
    time, and when stopped: called again, those jobs are not done again.

    Args:
        identity: what the file must belong to, beside these jobs.
        what: names the call where it is stopped.
        costs: of the jobs; the dearest go first.
    """
    state = ResumableState(file, identity_of(identity, list(jobs)), comm)
    results: dict[int, Any] = {int(number): table for number, table in state.load()[0].items()}
    mine, saved_at = {}, time.monotonic()
    missing = [number for number in range(len(jobs)) if number not in results]
    if costs is not None:
        missing.sort(key=lambda number: (-costs[number], number))

    def fold() -> None:
        for part in comm.all_gather_object(mine):
            results.update(part)
        mine.clear()
        if results and all(isinstance(result, Tensor) for result in results.values()):
            state.save({str(number): result for number, result in results.items()})

    rounds, reason = range(0, len(missing), comm.world), ""
    for start in bar(rounds, len(rounds)):
        due = comm.is_main and time.monotonic() - saved_at > SAVE_S
        stop, due = preemption.poll(comm, (int(due),))
        if stop or due:
            fold()
            saved_at = time.monotonic()
        if stop:
            done = f"after {len(results)} of {len(jobs)} jobs" if results else "before its first job"
            raise preemption.preempted_error(f"while scoring, in {what}, {done}")
        for number in missing[start : start + comm.world][comm.rank : comm.rank + 1]:
            try:
                mine[number] = on_cpu(run(jobs[number]))
            except PreemptedError as error:  # the next poll tells the others, who must not wait for this rank
                reason = str(error)
    if missing:
        fold()
    reasons = [why for why in comm.all_gather_object(reason) if why] if missing else []
    if reasons:
        raise PreemptedError(reasons[0])
    return [results[number] for number in range(len(jobs))]


def map_once(jobs: Sequence[Any], run: Run, comm: Communicator) -> list[Any]:
    """Every job once, on some rank; the results in the order of the jobs, on all ranks.

    Raises:
        PreemptedError: on every rank, where a job of any rank was asked to stop.
    """
    done, stopped = [], ""
    try:
        for number in range(comm.rank, len(jobs), comm.world):
            done.append((number, run(jobs[number])))
    except PreemptedError as error:  # the others wait for this rank's results: tell them before leaving
        stopped = str(error)
    parts = comm.all_gather_object((done, stopped))
    reason = next((why for _, why in parts if why), "")
    if reason:
        raise PreemptedError(reason)
    return [result for _, result in sorted((pair for part, _ in parts for pair in part), key=lambda pair: pair[0])]


def map_cached(
    jobs: Sequence[Any],
    run: Run,
    comm: Communicator,
    record: ResultCache,
    say: Callable[[str], None],
    what: str = "score",
) -> list[Any]:
    """Like ``dealt``; jobs on record are not made again, new results go there after each round.

    Args:
        jobs, run: jobs and results are plain JSON values (tuples become lists).
        say: tells the user how far it is, at every tenth.
        what: the act that is at it, for what is said.
    """
    missing, each, told = [job for job in jobs if job not in record], 1, 0
    while missing:
        if preemption.poll(comm)[0]:
            raise preemption.preempted_error(f"in {what}, with {len(missing)} of {len(jobs)} shared jobs to do")
        now, missing = missing[: each * comm.world], missing[each * comm.world :]
        start = time.monotonic()
        record.add(zip(now, map_once(now, run, comm), strict=True))
        done = len(jobs) - len(missing)
        if 10 * done // len(jobs) > told:
            told = 10 * done // len(jobs)
            say(f"  {what}: {done} of {len(jobs)} shared jobs")
        slowest = comm.max_ints(int(1000 * (time.monotonic() - start)))[0] / 1000
        each = max(1, min(2 * each, int(each * ROUND_S / max(slowest, 1e-3))))
    return [record[job] for job in jobs]


def on_cpu(value: Any) -> Any:
    """A job's result with its tensors on the CPU, to be sent to other ranks."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(inner) for inner in value)
    return value
