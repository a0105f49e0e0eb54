"""`python -m tiue_runtime`, and the program `tiue-runtime`."""

import contextlib
import os
import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line. End the process with its exit code."""
    try:
        from tiue_runtime.tools.cli import main

        code = main()
    except KeyboardInterrupt:  # `main` handles it, so it came while modules were imported.
        sys.stderr.write("tiue-runtime: error: interrupted\n")
        code = 128 + signal.SIGINT
    if code > 128:
        # A signal may have left a native call behind. One that returned while Python shuts down would abort it.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # There is none, or nobody reads it.
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
