"""The end of a command that trains: its status, and its error as one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tiue.distill.loop import DivergedError, StoppedError
from tiue.files import one_line
from tiue.settings import with_flags


def status_of(program: str, work: Callable[[], object], settings: type | None = None) -> int:
    """Do the work of a command. On failure, print the reason as one line on stderr.

    Args:
        program: the name of the command, for the line.
        work: trains, or does anything else.
        settings: the class of the settings. Their names in messages become flags.

    Returns:
        0; 1 if a training diverged; 2 if the work cannot be done; 128 plus the number of the signal that stopped it.
    """

    def failed(message: str, status: int) -> int:
        print(f"{program}: {with_flags(message, settings) if settings else message}", file=sys.stderr)
        return status

    try:
        work()
    except StoppedError as error:
        return failed(one_line(error), 128 + error.signal)
    except DivergedError as error:
        return failed(one_line(error), 1)
    except (ValueError, OSError) as error:
        return failed(one_line(error), 2)
    except KeyboardInterrupt:
        return failed("interrupted", 2)
    return 0
