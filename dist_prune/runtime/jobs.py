"""Independent jobs over the ranks: dealt out once, or in rounds with every result put on record."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dist_prune.runtime import stopping
from dist_prune.runtime.collectives import Ranks
from dist_prune.runtime.data.dealing import by_cost
from dist_prune.runtime.record import Record
from dist_prune.runtime.stopping import PreemptedError

Run = Callable[[Any], Any]
Bar = Callable[[Sequence[Any], int], Iterable[Any]]
ROUND_S = 2.0  # about so long between two looks at what the other ranks have done


def dealt(
    jobs: Sequence[Any], run: Run, ranks: Ranks, bar: Bar = lambda items, count: items,
    costs: Sequence[float] | None = None,
) -> list[Any]:  # fmt: skip
    """Every job once, on some rank; the results in the order of the jobs, on all ranks. ``bar`` shows this rank's
    progress. With ``costs`` ranks get about equal sums of them.

    Raises:
        PreemptedError: on every rank, where a job of any rank was asked to stop.
    """
    done, stopped = [], ""
    try:
        mine = by_cost(list(enumerate(jobs)), costs or [1.0] * len(jobs), ranks.world)[ranks.rank]
        for number, job in bar(mine, len(mine)):
            done.append((number, run(job)))
    except PreemptedError as error:  # the others wait for this rank's results: tell them before leaving
        stopped = str(error)
    parts = ranks.gather((done, stopped))
    reason = next((why for _, why in parts if why), "")
    if reason:
        raise PreemptedError(reason)
    return [result for _, result in sorted((pair for part, _ in parts for pair in part), key=lambda pair: pair[0])]


def recorded(jobs: Sequence[Any], run: Run, ranks: Ranks, record: Record, say: Callable[[str], None]) -> list[Any]:
    """Like ``dealt``; jobs on record are not made again, new results go there after each round.

    Args:
        jobs, run: jobs and results are plain JSON values (tuples become lists).
        say: tells the user how far it is, at every tenth.
    """
    missing, each, told = [job for job in jobs if job not in record], 1, 0
    while missing:
        if stopping.poll(ranks)[0]:
            raise stopping.leave(f"while scoring, with {len(missing)} of {len(jobs)} shared jobs to do")
        now, missing = missing[: each * ranks.world], missing[each * ranks.world :]
        start = time.monotonic()
        record.add(zip(now, dealt(now, run, ranks), strict=True))
        done = len(jobs) - len(missing)
        if 10 * done // len(jobs) > told:
            told = 10 * done // len(jobs)
            say(f"  score: {done} of {len(jobs)} shared jobs")
        slowest = ranks.largest(int(1000 * (time.monotonic() - start)))[0] / 1000
        each = max(1, min(2 * each, int(each * ROUND_S / max(slowest, 1e-3))))
    return [record[job] for job in jobs]
