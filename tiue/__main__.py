"""`python -m tiue`: see `tiue.distill.cli`."""

import sys

from tiue.distill.cli import main

if __name__ == "__main__":
    sys.exit(main())
