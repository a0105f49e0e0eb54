"""Memory modes: how many timesteps the decoder runs at once."""

from typing import Literal

Mode = Literal["parallel", "partial", "sequential"]  # from the fastest to the one that takes the least


# Timesteps per run of the decoder; None is all.
MODES: dict[Mode, int | None] = {"parallel": None, "partial": 2, "sequential": 1}


def timesteps_at_once(mode: Mode, steps: int) -> int:
    """k, the timesteps of one decoder run."""
    return min(MODES[mode] or steps, steps)


def lower_mode(mode: Mode, steps: int) -> Mode | None:
    """The next mode that takes fewer timesteps at once, None at the end."""
    modes = list(MODES)
    now = timesteps_at_once(mode, steps)
    return next((m for m in modes[modes.index(mode) :] if timesteps_at_once(m, steps) < now), None)
