"""`python -m tiue_runtime`."""

import sys

from tiue_runtime.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
