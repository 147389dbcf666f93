"""A recipe in, a finished run directory out.

    accelerate launch [--config_file launch/X.yaml] dist_prune/run.py --recipe NAME_OR_PATH
                      [--run-dir DIR] [--seed N] [key=value ...]

torchrun and plain python start the same file. Killed anywhere, the same command goes on.
"""

import argparse
import contextlib
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # launched by path: import the package from its parent, not its modules from its folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import signal

    from dist_prune.distributed import watchdog

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run listens there is nothing to save, and nothing to show
    watchdog.start()  # the launcher may be gone before torch is imported

from dist_prune import methods
from dist_prune.config import recipe, sweep
from dist_prune.distributed import error_summary, preemption, shared_folder
from dist_prune.distributed.communicator import RankLostError, peer_failures, shutdown
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.distributed.preemption import PreemptedError
from dist_prune.errors import MISSED, PruneError
from dist_prune.fileio import canonical, read_json, write_atomic
from dist_prune.pipeline import precheck as prechecks
from dist_prune.pipeline import runner
from dist_prune.pipeline.artifact_store import ArtifactStore
from dist_prune.pipeline.context import RunContext
from dist_prune.pipeline.ledger import bind_recipe, lock_run_directory
from dist_prune.pipeline.run_directory import clear_leftovers, run_directory
from dist_prune.training import tracking


class Parser(argparse.ArgumentParser):
    """argparse, whose complaint a launcher would bury too."""

    def error(self, message: str):
        error_summary.record(f"{self.prog}: error: {message} (--help has the options)", _rank())
        super().error(message)


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe; 0 when it is finished, 3 when it is and the target was missed, 2 for an error that its text
    explains, 1 for a bug."""
    parser = Parser(prog="run.py", description="A recipe in, a finished run directory out.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="a YAML file, or a name in recipes/")
    what.add_argument("--sweep", help="a sweep file, or a name in recipes/sweeps; one --task of it is run")
    parser.add_argument("--task", type=int, help="number of the sweep's task (default: $SLURM_ARRAY_TASK_ID)")
    parser.add_argument("--run-dir", help="where the run lives (default: runs/<recipe's name>, runs/<sweep>/<task>)")
    parser.add_argument("--seed", type=int, help="the recipe's seed key")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, for example score.images=500")
    given = parser.parse_intermixed_args(arguments)
    overrides = given.overrides + ([f"seed={given.seed}"] if given.seed is not None else [])

    def act(spec: recipe.Recipe, folder: Path, environment: DistributedEnvironment) -> str:
        return run(spec, folder, environment, folder.parent / "shared" if given.sweep else None)

    chosen = partial(sweep.choose_run, given.recipe, given.sweep, given.task, overrides, methods.options_of)
    return launched(chosen, given.run_dir, act)


def launched(
    choose: Callable[[], tuple[recipe.Recipe, str | Path]], run_dir: str | None,
    act: Callable[[recipe.Recipe, Path, DistributedEnvironment], str],
) -> int:  # fmt: skip
    """Join the other processes, ``act`` in the run directory that is locked meanwhile, leave together.

    Args:
        choose: reads the recipe and names the run directory that it has where ``run_dir`` is None.
        act: the work, on all ranks; says why the target was missed, or nothing.

    Returns: the exit code (see ``main``).
    """
    environment: DistributedEnvironment | None = None
    spec: recipe.Recipe | None = None
    started = time.time()
    error_summary.clear()
    try:
        spec, place = choose()
        folder = run_directory(run_dir, place)
        preemption.install_handlers()
        c = spec.cluster
        environment = DistributedEnvironment.start(c.timeout_s, c.tf32, c.deterministic, c.join_timeout_s)
        with contextlib.ExitStack() as held:
            environment.comm.run_on_main(lambda: held.enter_context(lock_run_directory(folder)))
            try:
                missed = act(spec, folder, environment)
            except PreemptedError:
                with contextlib.suppress(PruneError):  # a launcher ends all with the first that leaves: let all save
                    environment.comm.barrier()
                raise
        shutdown(environment.comm)
    except PruneError as error:
        return _stop(error, environment, started)
    except KeyboardInterrupt:
        return _stop(PruneError("interrupted; the same command goes on from here"), environment, started)
    except Exception as error:
        if "deterministic" in str(error) and spec is not None and spec.cluster.deterministic:
            reason = str(error).splitlines()[0]
            return _stop(PruneError(f"cluster.deterministic: {reason} Set it to false to go on."), environment, started)
        traceback.print_exc()
        return _stop(error, environment, started)
    if missed:
        text = f"target missed: {missed} (exit code {MISSED})"
        print(text, file=sys.stderr, flush=True)
        error_summary.record(text, environment.comm.rank)
    return MISSED if missed else 0


def run(
    spec: recipe.Recipe, folder: Path, environment: DistributedEnvironment, shared: Path | None = None, until: str = "",
    then: Callable[[RunContext], None] = lambda context: None,
) -> str:  # fmt: skip
    """All stages of a recipe, on all ranks; tasks of a sweep make the same things once, in ``shared``.

    ``until`` names the last stage to do, instead of all; ``then`` is done behind it.

    Returns: why the target was missed by more than its tolerance, or an empty string.
    """
    comm = environment.comm
    method = methods.build(spec.method)
    for name in spec.score.compare:
        methods.find(name)  # refuses unknown ones before any work
    fixed = [name for name in method.Options.score_options() if name not in method.Options.refinable_options()]
    tracking.check(spec.report.trackers)
    changed = comm.run_on_main(lambda: bind_recipe(folder, spec.written(), fixed, spec.resolved()))
    shared_folder.check_shared_folder(folder, comm)
    environment.claimed = folder
    comm.run_on_main(lambda: clear_leftovers(folder))
    tracker = tracking.Tracker(comm.is_main, spec.report.trackers, folder, spec.name)
    comm.run_on_main(lambda: shutil.rmtree(folder / "errors", ignore_errors=True))
    tracker.info(f"{spec.name}: {comm.world} process(es) on {environment.device}, results in {folder}")
    if changed:
        tracker.info(changed)
    context = RunContext(spec, environment, tracker, folder, method)
    if shared is not None:
        context.artifact_store = ArtifactStore(shared.resolve(), folder.resolve(), spec.cluster.holder_timeout_s)
    prechecks.precheck(context)
    missed = ""
    for stage in runner.stages_of(spec.schedule.rounds, spec.schedule.carry_optimizer):
        with peer_failures(comm):
            missed = runner.run_stage(stage, context)["facts"].get("missed", missed)
        if stage.name == until:
            break
    with peer_failures(comm):
        then(context)
    tracker.close()
    return missed


def _stop(error: Exception, environment: DistributedEnvironment | None, started: float) -> int:
    """Say what went wrong, on this rank and for the others, and leave without waiting for anyone."""
    folder = environment.claimed if environment is not None else None  # a run directory of others stays as it is
    rank = _rank()
    code = preemption.EXIT_CODE if isinstance(error, PreemptedError) else 2 if isinstance(error, PruneError) else 1
    text = str(error) if isinstance(error, PruneError) else f"{type(error).__name__}: {error}"
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if isinstance(error, RankLostError) and folder is not None:
        text += _cause(folder, rank, started)
    elif folder is not None and folder.is_dir():
        note = {"rank": rank, "code": code, "error": text, "at": time.time()}
        with contextlib.suppress(PruneError):  # the disk may be the trouble: what is said below has to do
            write_atomic(folder / "errors" / f"rank_{rank}.json", canonical(note))
    print(f"error{'' if alone else f' on rank {rank}'}: {text}", file=sys.stderr, flush=True)
    error_summary.record(f"error: {text}", rank, cause=not isinstance(error, RankLostError))
    if not alone:
        sys.stdout.flush()
        os._exit(code)  # a process group whose peers are gone can hang in its own clean-up
    return code


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _cause(folder: Path, rank: int, started: float) -> str:
    """What the rank that failed wrote down, if it did so within a few seconds."""
    for _ in range(20):
        for file in sorted(folder.glob("errors/rank_*.json")):
            note = read_json(file)
            if note.get("rank", rank) != rank and note.get("at", 0) >= started:
                return f"\nrank {note['rank']} stopped with: {note.get('error')}"
        time.sleep(0.25)
    return ""


if __name__ == "__main__":
    sys.exit(main())
