"""``dist-prune`` and ``python -m dist_prune``: the command line; its version is said without loading torch."""

import sys


def main() -> int | None:
    """Run the command line of ``sys.argv``.

    Returns:
        The exit code.
    """
    if sys.argv[1:] == ["--version"]:
        from dist_prune import __version__

        sys.stdout.write(f"dist-prune {__version__}\n")
        return 0
    from dist_prune.cli.main import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
