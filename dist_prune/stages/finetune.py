"""Train the small network again."""

from dist_prune.runtime import training
from dist_prune.runtime.evaluation import evaluate
from dist_prune.stages.work import Made, Work

SAVES = "finetune_checkpoint.safetensors"


def act(work: Work) -> Made:
    """round_1/small.safetensors -> tuned.safetensors"""
    recipe = work.recipe
    model = work.small("round_1/small.safetensors")
    loop = training.Loop(recipe.finetune, work.feed(True), work.machine, work.tracker, recipe.seed, "finetune")
    test = work.feed(False)
    history = training.train(
        model, loop,
        lambda m: evaluate(m, test, recipe.evaluate.batch, work.machine.ranks, work.tracker),
        work.folder / SAVES, work.identity,
    )  # fmt: skip
    meta = {"plan": work.plan.fingerprint}
    return Made({"history": history}, {"tuned.safetensors": (model.state_dict(), meta)}, drop=(SAVES,))
