"""``python -m dist_prune``: the same as ``dist-prune``."""

import sys

from dist_prune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
