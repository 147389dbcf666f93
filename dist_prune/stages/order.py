"""The acts of a run in their order, what each reads, and the files between them. Rounds repeat score, select, prune.

    dense.safetensors -> ( score -> select -> prune ) x rounds -> finetune -> evaluate -> export -> report

Between two rounds the network is finetuned for ``schedule.finetune_epochs``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

DENSE = "dense.safetensors"
TUNED, METRICS, CURVES = "tuned.safetensors", "metrics.json", "curves.csv"
BUNDLE = ("export/bundle.json", "export/model.safetensors")
REPORT = ("report.json", "report.html")


def round_path(number: int, file: str) -> str:
    """A file of a round (and a stage's name in the ledger).

    ``scores``; ``plan.json``: of all rounds so far, in dense coordinates; ``cut.json``: what this round cuts of the
    network before it; ``small``: what is left; ``carried``: the optimizer's state that came along; ``tuned``: finetuned
    before the next round; ``state``: the optimizer's by then.
    """
    return f"round_{number}/{file}"


NETWORK = ("backbone.name", "backbone.kwargs", "backbone.pretrained")
CHOSEN = ("backbone.checkpoint_key", "backbone.checkpoint_skip")  # of the file, whose digest comes from outside
IMAGES = tuple(
    f"data.{key}"
    for key in (
        "source", "train_split", "eval_split", "classes", "class_order", "layout", "mean", "std", "image_size",
        "crop", "crop_mode", "interpolation", "exif",
    )
)  # fmt: skip
DRAWN = tuple(
    f"data.{key}"
    for key in (
        "augment",
        "padding",
        "crop_scale",
        "crop_ratio",
        "auto_augment",
        "random_erasing",
        "random_erasing_mode",
    )
)
TRAINING = (*NETWORK, *IMAGES, *DRAWN, "data.resize_schedule", "seed")
ORIGIN = ("name", "seed", "method.name", "finetune.epochs")
RECALIBRATION = ("score.balance", "score.micro_batch")
SCORING = (*NETWORK, *IMAGES, *DRAWN, "score.images", "score.balance", "score.micro_batch", "seed")


@dataclass(frozen=True)
class Stage:
    """One act.

    Attributes:
        name: its file in this folder.
        reads: the recipe fields that decide its result (and nothing else does, beside the inputs).
        inputs: artifacts it starts from.
        outputs: artifacts it makes.
        always: run it in every run, finished or not (reports are cheap and tell what happened).
        round: the round it belongs to; what follows the rounds belongs to the last one.
        label: its name in the ledger: those of the first round and after the last have no round in it.
    """

    name: str
    reads: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    always: bool = False
    round: int = 1
    label: str = ""

    def __post_init__(self):
        if not self.label:
            object.__setattr__(self, "label", self.name)

    @property
    def between(self) -> bool:
        """Whether it is a finetuning between two rounds."""
        return self.name == "finetune" and self.label != self.name


HELD = ("train.holdout", "train.images")
MANY = ("many.json", "many.safetensors")
SCORES, PLAN, SMALL = (
    round_path(1, "scores.safetensors"),
    round_path(1, "plan.json"),
    round_path(1, "small.safetensors"),
)
ORDER = (
    Stage("train", (*TRAINING, *CHOSEN, "train"), (), (DENSE,)),
    Stage("many", (*SCORING, "score.many", "method", "select", "target", "evaluate", *HELD), (DENSE,), MANY),
    Stage("score", SCORING, (DENSE,), (SCORES,)),
    Stage("select", (*NETWORK, "data.source", "data.image_size", "method", "select", "target"), (SCORES,), (PLAN,)),
    Stage("prune", (*NETWORK, "method.fidelity", "method.quirks", "seed"), (DENSE, SCORES, PLAN), (SMALL,)),
    Stage("finetune", (*TRAINING, *RECALIBRATION, "finetune", "reruns"), (DENSE, SMALL, PLAN), (TUNED,)),
    Stage("evaluate", (*NETWORK, *IMAGES, "evaluate", "report"), (DENSE, SMALL, TUNED, PLAN), (METRICS,)),
    Stage("curves", (*NETWORK, *IMAGES, "information", "evaluate", "score.micro_batch"), (DENSE, SCORES), (CURVES,)),
    Stage("export", (*NETWORK, *IMAGES, *ORIGIN), (TUNED, PLAN, METRICS), BUNDLE),
    Stage("report", (), (PLAN, METRICS, CURVES), REPORT, always=True),
)
REPEATED = ("score", "select", "prune")
# what tasks of a sweep make once for all, and what each keeps meanwhile to resume
SHARED = {"train": ("train_checkpoints",), "score": ("round_1/partial",)}


def order(rounds: int, carry: bool = False) -> tuple[Stage, ...]:
    """The stages of a run; one shot is ``ORDER``. ``carry``: the optimizer's state goes through the rounds."""
    return ORDER if rounds == 1 else tuple(_rounds(rounds, carry))


def _rounds(rounds: int, carry: bool) -> Iterator[Stage]:
    plain = {stage.name: stage for stage in ORDER}
    plans = tuple(round_path(number, "plan.json") for number in range(1, rounds + 1))
    nets = tuple(round_path(n, f"{kind}.safetensors") for n in range(1, rounds) for kind in ("small", "tuned"))
    small, plan = round_path(rounds, "small.safetensors"), plans[-1]
    carried = (round_path(rounds, "carried.safetensors"),) if carry else ()
    yield plain["train"]
    yield plain["many"]
    for number in range(1, rounds + 1):
        yield from _round(number, number == rounds, carry)
    for name, more, inputs in (
        ("finetune", ("schedule",), (DENSE, small, plan, *carried)),
        ("evaluate", ("target", "schedule"), (DENSE, small, TUNED, *nets, *plans)),
        ("curves", (), plain["curves"].inputs),
        ("export", (), (TUNED, plan, METRICS)),
        ("report", (), (*plans, METRICS, CURVES)),
    ):
        yield replace(plain[name], reads=(*plain[name].reads, *more), inputs=inputs, round=rounds)


def _round(number: int, last: bool, carry: bool) -> Iterator[Stage]:
    """Score, select and prune; and the finetuning behind them where another round follows."""
    plain, first = {stage.name: stage for stage in ORDER}, number == 1
    start = (DENSE,) if first else (round_path(number - 1, "tuned.safetensors"), round_path(number - 1, "plan.json"))
    scores, plan, small = (
        round_path(number, file) for file in ("scores.safetensors", "plan.json", "small.safetensors")
    )
    cut = () if first else (round_path(number, "cut.json"),)
    state = () if first or not carry else (round_path(number - 1, "state.safetensors"),)
    carried = () if first or not carry else (round_path(number, "carried.safetensors"),)
    for name, more, inputs, outputs in (
        ("score", (), start, (scores,)),
        ("select", ("schedule.rounds", "schedule.spacing"), (scores, *start[1:]), (plan, *cut)),
        ("prune", (), (*start, scores, plan, *cut, *state), (small, *carried)),
    ):
        stage = replace(plain[name], reads=(*plain[name].reads, *more), inputs=inputs, outputs=outputs, round=number)
        yield stage if first else replace(stage, label=round_path(number, name))
    if not last:
        reads = (*TRAINING, *RECALIBRATION, "finetune", "schedule.finetune_epochs", "schedule.carry_optimizer")
        made = (round_path(number, "tuned.safetensors"), *((round_path(number, "state.safetensors"),) if carry else ()))
        label = round_path(number, "finetune")
        yield Stage("finetune", reads, (DENSE, small, plan, *carried), made, round=number, label=label)
