"""`python -m evaluation`: see `evaluation.cli`."""

import logging
import sys

# At import, diffusers reports that optimum-onnx shares a namespace with optimum.
logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)

from evaluation.cli import main  # noqa: E402 (after the above)

if __name__ == "__main__":
    sys.exit(main())
