"""The end of a command: its status, and its error as one line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from tiue.distill.errors import DivergedError, StoppedError
from tiue.files import one_line
from tiue.settings import with_flags

_LONGEST = 2000  # characters of a message: some list all settings that changed


def status_of(program: str, work: Callable[[], object], settings: type | None = None) -> int:
    """Do the work of a command. On failure, print the reason as one line on stderr.

    Args:
        program: the name of the command, for the line.
        work: trains, or does anything else.
        settings: the class of the settings. Their names in messages become flags.

    Returns:
        0; 1 if a training diverged; 2 if the work cannot be done; 128 plus the number of the signal that stopped it.
    """

    def failed(error: BaseException | str, status: int) -> int:
        message = one_line(error, _LONGEST)
        print(f"{program}: error: {with_flags(message, settings) if settings else message}", file=sys.stderr)
        return status

    try:
        work()
    except StoppedError as error:
        return failed(error, 128 + error.signal)
    except DivergedError as error:
        return failed(error, 1)
    except (ValueError, OSError) as error:
        return failed(error, 2)
    except KeyboardInterrupt:
        return failed("interrupted", 128 + signal.SIGINT)
    return 0
