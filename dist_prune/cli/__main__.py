"""``python -m dist_prune.cli``."""

import sys

from dist_prune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
