"""The acts of a run in their order, what each reads, and the files between them. Rounds repeat score, select, prune.

    dense.safetensors -> ( score -> select -> prune ) x rounds -> finetune -> evaluate -> export -> report

Between two rounds the network is finetuned for ``schedule.finetune_epochs``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dist_prune.config.recipe import Recipe
from dist_prune.config.stage_keys import keys_read_by

DENSE, PRUNED, FINETUNED = "dense.safetensors", "pruned.safetensors", "finetuned.safetensors"
OPTIMIZER_STATE, OPTIMIZER_CARRIED = "optimizer_state.safetensors", "optimizer_carried.safetensors"
METRICS, CURVES = "metrics.json", "curves.csv"
BUNDLE = ("export/bundle.json", "export/model.safetensors")
REPORT = ("report.json", "report.html")


def round_path(number: int, file: str) -> str:
    """An artifact of a round (and a stage's name in the ledger).

    ``scores``; ``plan.json``: of all rounds so far, in dense coordinates; ``cut.json``: what this round cuts of the
    network before it; ``pruned``: the network that is left; ``optimizer_carried``: the optimizer's state after the cut;
    ``finetuned``: the network that the next round starts from; ``optimizer_state``: that of its finetuning.
    """
    return f"round_{number}/{file}"


def _reads(*readers: str) -> tuple[str, ...]:
    return tuple(key for reader in readers for key in keys_read_by(reader, Recipe))


@dataclass(frozen=True)
class Stage:
    """One act.

    Attributes:
        name: its file in this folder.
        inputs: artifacts it starts from.
        outputs: artifacts it makes.
        always: run it in every run, finished or not (reports are cheap and tell what happened).
        round: the round it belongs to; what follows the rounds belongs to the last one.
        label: its name in the ledger: those of the first round and after the last have no round in it.
        reads: the recipe keys that decide its result (and nothing else does, beside the inputs), as declared on them.
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
        """Whether it is a finetuning between two rounds."""
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
    Stage("evaluate", (DENSE, CUT_ONCE, FINETUNED, PLAN), (METRICS,)),
    Stage("curves", (DENSE, SCORES), (CURVES,)),
    Stage("export", (FINETUNED, PLAN, METRICS), BUNDLE),
    Stage("report", (PLAN, METRICS, CURVES), REPORT, always=True),
)
# what tasks of a sweep make once for all, and what each keeps meanwhile to resume
SHARED = {"train": ("train_checkpoints",), "score": ("round_1/partial",)}


def stages_of(rounds: int, carry: bool = False) -> tuple[Stage, ...]:
    """The stages of a run; one shot is ``ORDER``. ``carry``: the optimizer's state goes through the rounds."""
    return ORDER if rounds == 1 else tuple(_rounds(rounds, carry))


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
