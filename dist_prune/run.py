"""Run a recipe: from its file to a finished run directory.

    accelerate launch [--config_file launch/X.yaml] dist_prune/run.py --recipe NAME_OR_PATH
                      [--run-dir DIR] [--seed N] [key=value ...]

torchrun and plain python start the same file. The same command resumes a run that was stopped anywhere.
"""

import argparse
import contextlib
import gc
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

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the run installs its handlers there is nothing to save
    watchdog.start()  # the launcher may end before torch is imported
    gc.disable()  # collections take a fifth of the time of the imports below and find nothing

from dist_prune import methods, plugins
from dist_prune.config import sweep
from dist_prune.config.recipe import Recipe
from dist_prune.distributed import error_summary, preemption, shared_folder, watchdog
from dist_prune.distributed.communicator import RankLostError, peer_failures, shutdown
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.distributed.preemption import PreemptedError
from dist_prune.distributed.same_plugins import check_same_plugins
from dist_prune.errors import MISSED, PruneError
from dist_prune.fileio import canonical, read_json, write_atomic
from dist_prune.pipeline import runner
from dist_prune.pipeline.artifact_store import ArtifactStore
from dist_prune.pipeline.context import RunContext
from dist_prune.pipeline.ledger import bind_recipe, lock_run_directory, name_holder
from dist_prune.pipeline.method_choice import keep_choice
from dist_prune.pipeline.precheck import precheck
from dist_prune.pipeline.run_directory import clear_leftovers, run_directory
from dist_prune.pipeline.stage_graph import stages_of_recipe
from dist_prune.training import tracking
from dist_prune.training.progress import duration


class Parser(argparse.ArgumentParser):
    """A parser whose errors also join the launcher's summary, which would hide them otherwise."""

    def error(self, message: str):
        """Record the message, print it and exit."""
        error_summary.record(f"{self.prog}: error: {message} (--help has the options)", _rank(), code=PruneError.code)
        super().error(message)


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe.

    Args:
        arguments: the command line without the program's name; None: that of this process.

    Returns:
        The exit code: 0 if the run is finished, 3 if it is finished and missed its target, 2 for an error that its text
        explains, 75 if it was preempted and can be resumed, 1 for a bug.
    """
    parser = Parser(prog="run.py", description="Run a recipe: from its file to a finished run directory.")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--recipe", help="a YAML file, or a name in recipes/")
    choice.add_argument("--sweep", help="a sweep file, or a name in recipes/sweeps; one --task of it is run")
    parser.add_argument("--task", type=int, help="number of the sweep's task (default: $SLURM_ARRAY_TASK_ID)")
    parser.add_argument("--run-dir", help="the run directory (default: runs/<recipe's name> or runs/<sweep>/<task>)")
    parser.add_argument("--seed", type=int, help="value of the recipe's seed key")
    parser.add_argument("--quiet", action="store_true", help="print errors and a missed target only")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, for example score.images=500")
    options = parser.parse_intermixed_args(arguments)
    if options.quiet:
        os.environ[tracking.QUIET] = "1"
    overrides = options.overrides + ([f"seed={options.seed}"] if options.seed is not None else [])

    def run_stages(recipe: Recipe, run_dir: Path, environment: DistributedEnvironment) -> str:
        return run(recipe, run_dir, environment, run_dir.parent / "shared" if options.sweep else None)

    choose = partial(sweep.choose_run, options.recipe, options.sweep, options.task, overrides, methods.options_of)
    return execute(choose, options.run_dir, run_stages)


def execute(
    choose: Callable[[], tuple[Recipe, str | Path]],
    run_dir: str | None,
    work: Callable[[Recipe, Path, DistributedEnvironment], str],
) -> int:
    """Join the other processes, work in the locked run directory, and leave together.

    Args:
        choose: reads the recipe, and names its default run directory.
        run_dir: the run directory; None: the default one.
        work: called on all ranks; returns why the target was missed, or an empty text.

    Returns:
        The exit code (see ``main``).
    """
    environment: DistributedEnvironment | None = None
    recipe: Recipe | None = None
    started = time.time()
    error_summary.clear()
    try:
        recipe, default_dir = choose()
        folder = run_directory(run_dir, default_dir)
        preemption.install_handlers()
        cluster = recipe.cluster
        environment = DistributedEnvironment.start(
            cluster.timeout_s, cluster.tf32, cluster.deterministic, cluster.join_timeout_s
        )
        with contextlib.ExitStack() as locks:
            environment.comm.run_on_main(lambda: locks.enter_context(lock_run_directory(folder)))
            try:
                missed = work(recipe, folder, environment)
            except PreemptedError:
                # all ranks save first: a launcher ends all processes when one leaves
                with contextlib.suppress(PruneError):
                    environment.comm.barrier()
                raise
        shutdown(environment.comm)
    except PruneError as error:
        return _stop(error, environment, started)
    except KeyboardInterrupt:
        return _stop(PruneError("interrupted; the same command resumes from here"), environment, started)
    except Exception as error:
        if "deterministic" in str(error) and recipe is not None and recipe.cluster.deterministic:
            reason = str(error).splitlines()[0]
            return _stop(
                PruneError(f"cluster.deterministic: {reason} Set it to false to continue."), environment, started
            )
        traceback.print_exc()
        return _stop(error, environment, started)
    if missed:
        text = f"target missed: {missed} (exit code {MISSED})"
        print(text, file=sys.stderr, flush=True)
        error_summary.record(text, environment.comm.rank, code=MISSED)
    return MISSED if missed else 0


def run(
    recipe: Recipe,
    folder: Path,
    environment: DistributedEnvironment,
    shared: Path | None = None,
    until: str = "",
    then: Callable[[RunContext], None] = lambda context: None,
) -> str:
    """Run the stages of a recipe, on all ranks.

    Args:
        recipe: the recipe.
        folder: the run directory, locked by the caller.
        environment: the processes of the run.
        shared: folder of the artifacts that tasks of a sweep share; None: the run shares none.
        until: name of the last stage; empty: all stages.
        then: called with the run's context after the last stage.

    Returns:
        Why the target was missed by more than its tolerance, or an empty text.

    Raises:
        PruneError: if the recipe, its inputs or the run directory are refused, or a stage fails for such a reason.
        PreemptedError: if the run was asked to stop, and has saved its state.
    """
    comm = environment.comm
    check_same_plugins(comm)
    recipe = comm.broadcast_object(comm.run_on_main(lambda: keep_choice(folder, recipe))) or recipe
    method = methods.build(recipe.method)
    for name in recipe.score.compare:
        methods.find(name)  # refuses unknown ones before any work
    fixed = [name for name in method.Options.score_options() if name not in method.Options.refinable_options()]
    tracking.check(recipe.report.trackers)
    changed = comm.run_on_main(lambda: bind_recipe(folder, recipe.written(), fixed, recipe.resolved()))
    shared_folder.check_shared_folder(folder, comm)
    environment.claimed = folder
    comm.run_on_main(lambda: name_holder(folder, comm.world))
    comm.run_on_main(lambda: clear_leftovers(folder))
    tracker = tracking.Tracker(comm.is_main, recipe.report.trackers, folder, recipe.name)
    comm.run_on_main(lambda: shutil.rmtree(folder / "errors", ignore_errors=True))
    tracker.info(f"{recipe.name}: {comm.world} process(es) on {environment.device}, results in {folder}")
    for line in filter(None, (recipe.choice, changed)):
        tracker.info(line)
    context = RunContext(recipe, environment, tracker, folder, method)
    if shared is not None:
        context.artifact_store = ArtifactStore(shared.resolve(), folder.resolve(), recipe.cluster.holder_timeout_s)
    precheck(context)
    if broken := plugins.warning(plugins.unusable()):
        tracker.info(broken)
    missed, began, seconds = "", time.monotonic(), {}
    for stage in stages_of_recipe(recipe):
        before = time.monotonic()
        with peer_failures(comm):
            missed = runner.run_stage(stage, context)["facts"].get("missed", missed)
        seconds[stage.label] = time.monotonic() - before
        if stage.name == until:
            break
    with peer_failures(comm):
        then(context)
    longest = sorted(seconds, key=lambda label: -seconds[label])[:3]
    parts = ", ".join(f"{label} {duration(seconds[label])}" for label in seconds if label in longest)
    whole = duration(time.time() - watchdog.command_began())
    took = duration(time.monotonic() - began)
    tracker.info(f"{recipe.name}: finished in {took} ({parts}); the command took {whole}")
    tracker.close()
    return missed


def _stop(error: Exception, environment: DistributedEnvironment | None, started: float) -> int:
    """Report an error on this rank and to the others, and leave without waiting for them.

    Args:
        error: the error that ended the run.
        environment: the processes of the run, if they have joined.
        started: time of this rank's start, in seconds since the epoch.

    Returns:
        The exit code. In a run of several processes it does not return.
    """
    folder = environment.claimed if environment is not None else None  # another run's directory stays as it is
    rank = _rank()
    code = preemption.EXIT_CODE if isinstance(error, PreemptedError) else 2 if isinstance(error, PruneError) else 1
    text = str(error) if isinstance(error, PruneError) else f"{type(error).__name__}: {error}"
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if isinstance(error, RankLostError) and folder is not None:
        text += _error_of_failed_rank(folder, rank, started)
    elif folder is not None and folder.is_dir():
        note = {"rank": rank, "code": code, "error": text, "at": time.time()}
        with contextlib.suppress(PruneError):  # the disk may be the cause; the lines below remain
            write_atomic(folder / "errors" / f"rank_{rank}.json", canonical(note))
    print(f"error{'' if alone else f' on rank {rank}'}: {text}", file=sys.stderr, flush=True)
    error_summary.record(f"error: {text}", rank, not isinstance(error, RankLostError), code)
    if not alone:
        sys.stdout.flush()
        os._exit(code)  # a process group whose peers are gone can hang in its own clean-up
    return code


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _error_of_failed_rank(folder: Path, rank: int, started: float) -> str:
    """The error that the failed rank recorded, if it did so within five seconds; else an empty text."""
    for _ in range(20):
        for file in sorted(folder.glob("errors/rank_*.json")):
            note = read_json(file)
            if note.get("rank", rank) != rank and note.get("at", 0) >= started:
                return f"\nrank {note['rank']} stopped with: {note.get('error')}"
        time.sleep(0.25)
    return ""


if __name__ == "__main__":
    gc.freeze()  # modules stay to the end: later collections need not look at them
    gc.enable()
    sys.exit(main())
