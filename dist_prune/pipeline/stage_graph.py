"""The stages of a run in their order, with the artifacts and recipe keys that each reads.

    train -> [many] -> ( score -> select -> prune [-> repair] [-> finetune] ) x rounds -> finetune -> evaluate
    -> curves -> export -> report

``many`` compares criteria (``score.compare``). ``repair`` is there if the recipe repairs (``Recipe.repairs``).
Between two rounds the network is finetuned for ``schedule.finetune_epochs``. The
module of each stage in ``dist_prune/stages`` names its artifacts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dist_prune.config.recipe import Recipe
from dist_prune.config.stage_keys import keys_read_by

DENSE = "dense.safetensors"
PRUNED = "pruned.safetensors"
REPAIRED = "repaired.safetensors"
FINETUNED = "finetuned.safetensors"
OPTIMIZER_STATE, OPTIMIZER_CARRIED = "optimizer_state.safetensors", "optimizer_carried.safetensors"
SEARCHED = "round_1/search.json"
METRICS, CURVES, ANSWERS = "metrics.json", "curves.csv", "answers.safetensors"
BUNDLE = ("export/bundle.json", "export/model.safetensors")
REPORT = ("report.json", "report.html")


def round_path(number: int, file: str) -> str:
    """The name of a round's artifact, or a stage's label in the ledger.

    The artifacts of a round are:
        scores.safetensors: the method's scores.
        plan.json: the plan of all rounds so far, in dense coordinates.
        search.json: the candidates of the round's search and their front (with ``select.search``).
        cut.json: the plan of this round alone, in coordinates of the network that it starts from (from round 2 on).
        pruned.safetensors: the weights of the pruned network.
        repaired.safetensors: the same after the repair (with ``repair.method``).
        optimizer_carried.safetensors: the optimizer's state after pruning (with ``schedule.carry_optimizer``).
        finetuned.safetensors: the weights that the next round starts from.
        optimizer_state.safetensors: the optimizer's state after that finetuning (with ``schedule.carry_optimizer``).

    Args:
        number: The round, counted from 1.
        file: Name of the artifact or of the stage.
    """
    return f"round_{number}/{file}"


def _reads(*readers: str) -> tuple[str, ...]:
    return tuple(key for reader in readers for key in keys_read_by(reader, Recipe))


@dataclass(frozen=True)
class Stage:
    """One stage of a run: which artifacts it reads and writes, and which recipe keys decide its result.

    Attributes:
        name: Name of the stage: the file in ``dist_prune/stages`` (see ``runner.MODULES`` for two exceptions).
        inputs: Artifacts that it reads, relative to the run directory.
        outputs: Artifacts that it writes.
        always: Whether it runs even if it is done (the report is cheap and describes this run).
        round: Round that it belongs to, counted from 1; stages after the rounds belong to the last one.
        label: Name in the ledger, ``name`` by default; in rounds from the second on, ``round_N/name``. A finetuning
            between rounds has the round in its label too.
        reads: Recipe keys that decide its result, beside the inputs; by default those that declare to be read by it.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    always: bool = False
    round: int = 1
    label: str = ""
    reads: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "label", self.label or self.name)
        object.__setattr__(self, "reads", self.reads or _reads(self.name))

    @property
    def between(self) -> bool:
        """Whether it is the finetuning between two rounds."""
        return self.name == "finetune" and self.label != self.name


CRITERIA = ("criteria.json", "criteria.safetensors")
SCORES, PLAN, CUT_ONCE = (round_path(1, file) for file in ("scores.safetensors", "plan.json", PRUNED))
ORDER = (
    Stage("train", (), (DENSE,)),
    Stage("many", (DENSE,), CRITERIA),
    Stage("score", (DENSE,), (SCORES,)),
    Stage("select", (SCORES,), (PLAN,)),
    Stage("prune", (DENSE, SCORES, PLAN), (CUT_ONCE,)),
    Stage("finetune", (DENSE, CUT_ONCE, PLAN), (FINETUNED,)),
    Stage("evaluate", (DENSE, CUT_ONCE, FINETUNED, PLAN), (METRICS, ANSWERS)),
    Stage("curves", (DENSE, SCORES), (CURVES,)),
    Stage("export", (FINETUNED, PLAN, METRICS), BUNDLE),
    Stage("report", (PLAN, METRICS, CURVES), REPORT, always=True),
)
# Stages that the tasks of a sweep share, each with the folders that a task needs only to resume it.
SHARED = {"train": ("train_checkpoints",), "score": ("round_1/partial",)}


def stages_of(rounds: int, carry: bool = False, repair: bool = False, search: bool = False) -> tuple[Stage, ...]:
    """The stages of a run in their order.

    Args:
        rounds: ``schedule.rounds``, at least 1. One round gives ``ORDER``.
        carry: ``schedule.carry_optimizer``: whether the optimizer's state is carried through the rounds.
        repair: Whether pruned networks are repaired (``repair.method``).
        search: Whether the selection judges pruned networks (``select.search``).
    """
    stages = ORDER if rounds == 1 else tuple(_rounds(rounds, carry))
    stages = tuple(_with_search(stages)) if search else stages
    return tuple(_with_repair(stages, rounds)) if repair else stages


def stages_of_recipe(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe's run in their order."""
    schedule = recipe.schedule
    return stages_of(schedule.rounds, schedule.carry_optimizer, recipe.repairs, judges(recipe))


def judges(recipe: Recipe) -> bool:
    """Whether the stage ``select`` of a recipe judges pruned networks on images."""
    search = recipe.select.search
    return search is not None and search.solver == "evolution" and recipe.select.plan is None


def cut_weights(recipe: Recipe, number: int) -> str:
    """The artifact with the weights that are finetuned after a round: repaired, or as they were cut.

    Args:
        recipe: The recipe.
        number: The round, counted from 1.
    """
    return round_path(number, REPAIRED if recipe.repairs else PRUNED)


def _with_search(stages: tuple[Stage, ...]) -> Iterator[Stage]:
    """The stages with selections that read the network that their round starts from, and images."""
    for stage in stages:
        if stage.name == "select":
            start = DENSE if stage.round == 1 else round_path(stage.round - 1, FINETUNED)
            stage = replace(
                stage,
                inputs=(start, *stage.inputs),
                outputs=(*stage.outputs, round_path(stage.round, "search.json")),
                reads=(*stage.reads, *_reads("search")),
            )
        yield stage


def _with_repair(stages: tuple[Stage, ...], rounds: int) -> Iterator[Stage]:
    """The stages with a repair after each cut; finetunings start from it, and it is evaluated."""
    repaired = {round_path(number, PRUNED): round_path(number, REPAIRED) for number in range(1, rounds + 1)}
    for stage in stages:
        if stage.name == "finetune":
            stage = replace(stage, inputs=tuple(repaired.get(name, name) for name in stage.inputs))
        elif stage.name == "evaluate":
            stage = replace(stage, inputs=(*stage.inputs, *repaired.values()))
        yield stage
        if stage.name == "prune":
            start = [name for name in stage.inputs if not name.endswith("scores.safetensors")]
            label = "repair" if stage.label == "prune" else round_path(stage.round, "repair")
            inputs = (*start, round_path(stage.round, PRUNED))
            yield Stage("repair", inputs, (round_path(stage.round, REPAIRED),), round=stage.round, label=label)


def _rounds(rounds: int, carry: bool) -> Iterator[Stage]:
    one_shot = {stage.name: stage for stage in ORDER}
    plans = tuple(round_path(number, "plan.json") for number in range(1, rounds + 1))
    nets = tuple(round_path(n, name) for n in range(1, rounds) for name in (PRUNED, FINETUNED))
    pruned, plan = round_path(rounds, PRUNED), plans[-1]
    carried = (round_path(rounds, OPTIMIZER_CARRIED),) if carry else ()
    yield one_shot["train"]
    yield one_shot["many"]
    for number in range(1, rounds + 1):
        yield from _round(number, number == rounds, carry)
    for name, inputs in (
        ("finetune", (DENSE, pruned, plan, *carried)),
        ("evaluate", (DENSE, pruned, FINETUNED, *nets, *plans)),
        ("curves", one_shot["curves"].inputs),
        ("export", (FINETUNED, plan, METRICS)),
        ("report", (*plans, METRICS, CURVES)),
    ):
        yield replace(one_shot[name], reads=_reads(name, f"{name}_in_rounds"), inputs=inputs, round=rounds)


def _round(number: int, last: bool, carry: bool) -> Iterator[Stage]:
    """Score, select and prune; then the finetuning, if another round follows."""
    first = number == 1
    start = (DENSE,) if first else (round_path(number - 1, FINETUNED), round_path(number - 1, "plan.json"))
    scores, plan, pruned = (round_path(number, f) for f in ("scores.safetensors", "plan.json", PRUNED))
    cut = () if first else (round_path(number, "cut.json"),)
    state = () if first or not carry else (round_path(number - 1, OPTIMIZER_STATE),)
    carried = () if first or not carry else (round_path(number, OPTIMIZER_CARRIED),)
    for name, inputs, outputs in (
        ("score", start, (scores,)),
        ("select", (scores, *start[1:]), (plan, *cut)),
        ("prune", (*start, scores, plan, *cut, *state), (pruned, *carried)),
    ):
        label = name if first else round_path(number, name)
        yield Stage(name, inputs, outputs, round=number, label=label, reads=_reads(name, f"{name}_in_rounds"))
    if not last:
        outputs_kept = (round_path(number, FINETUNED), *((round_path(number, OPTIMIZER_STATE),) if carry else ()))
        label, reads = round_path(number, "finetune"), _reads("finetune_between")
        yield Stage("finetune", (DENSE, pruned, plan, *carried), outputs_kept, round=number, label=label, reads=reads)
