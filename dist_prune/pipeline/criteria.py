"""The criteria that ``score.compare`` compares."""

from dist_prune import methods
from dist_prune.errors import PruneError
from dist_prune.methods.base import Method
from dist_prune.pipeline.context import RunContext
from dist_prune.pruning.surgery.verified_trace import trace_groups


def build_criterion(context: RunContext, name: str) -> Method:
    """A criterion to compare: a method with default options, or the recipe's own method with the recipe's options.

    Args:
        context: The run.
        name: The method's name.

    Raises:
        PruneError: There is no such method, or it trains weights while it scores.
    """
    kind = methods.find(name)
    if name == context.recipe.method["name"]:
        return context.method
    if kind.trains_weights:
        raise PruneError(f"score.compare: {name} trains weights while it scores; compare it by a run of its own")
    return kind(kind.Options())


def check_criteria(context: RunContext) -> None:
    """Check that every criterion of ``score.compare`` can score this network and do what the recipe asks for.

    Raises:
        PruneError: One of them cannot, or a name occurs twice.
    """
    names = context.recipe.score.compare
    if len(set(names)) < len(names):
        raise PruneError(f"score.compare: each method once, got {', '.join(names)}")
    if not names:
        return
    graph = trace_groups(
        context.networks.create().eval(),
        context.images.example_input,
        context.recipe.backbone.protect,
        context.recipe.backbone.streams,
        context.recipe.backbone.units,
    )
    for name in names:
        method = build_criterion(context, name)
        try:
            method.prepare(method.prunable(graph), context.recipe.select.exclude, context.selection)
        except PruneError as error:
            raise PruneError(f"score.compare: {name}: {error}") from error
