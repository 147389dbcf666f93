"""``dist-prune push``: a bundle with its model card on the Hugging Face hub, or in a folder."""

import argparse

from dist_prune.cli.deferred_imports import import_without_compiler
from dist_prune.cli.verb import Answer, bundle_folder
from dist_prune.errors import PruneError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("bundle", help="a run directory or its export folder")
    parser.add_argument("destination", help="owner/name on the hub, or a path that begins with ./ or /")
    parser.add_argument("--private", action="store_true", help="create the hub's repository as a private one")


def run(arguments: argparse.Namespace) -> Answer:
    """Push the bundle, the exported files beside it and a model card.

    Raises:
        PruneError: if the bundle is missing or damaged, or the destination refuses.
    """
    folder = bundle_folder(arguments.bundle)
    if folder is None:
        raise PruneError(f"{arguments.bundle}: there is no such folder; name a run directory or its export folder")
    import_without_compiler(timm=True)
    from dist_prune.export import bundle, formats, hub  # torch takes seconds to import

    body = bundle.read_bundle(folder).body  # a damaged bundle is not pushed
    exported = sorted(f.name for f in folder.iterdir() if f.name.endswith(tuple(formats.SUFFIX.values())))
    card = hub.model_card(body, hub.report_of(folder))
    files = (bundle.MANIFEST, bundle.WEIGHTS, *exported)
    where = hub.push(folder, arguments.destination, files, card, arguments.private)
    return f"{where}: {', '.join((*files, hub.CARD))}", {"where": where, "files": [*files, hub.CARD]}, 0
