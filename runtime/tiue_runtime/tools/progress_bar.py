"""A progress bar on a terminal. In a pipe it draws nothing."""

import argparse
import sys
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from tiue_runtime.progress import Progress


def bar_for(arguments: argparse.Namespace, pictures: int, there: int = 0) -> "Bar | None":
    """Return a bar if a person may be watching stderr, and wants to. The numbers are those of `Bar`."""
    watched = sys.stderr is not None and sys.stderr.isatty()
    return Bar(pictures, there) if watched and not (arguments.quiet or arguments.json) else None


class Bar:
    """One line on stderr: pictures, a bar, and time. It is gone when the work is done.

    Args:
        pictures: how many are made in all.
        there: how many were made before.
    """

    previews = False  # so that the memory mode is the same with and without a bar

    def __init__(self, pictures: int, there: int = 0) -> None:
        self._done = there
        self._bar: Any = tqdm(
            total=pictures,
            initial=there,
            desc="loading",
            leave=False,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )
        self._at_once = 1
        self._begun = False

    def begin(self, at_once: int) -> None:
        """Begin a request of so many pictures."""
        if not self._begun:
            self._begun = True
            self._bar.unpause()  # The time of loading says nothing about the time that is left.
        self._at_once = at_once
        last = self._done + at_once
        numbers = f"{last}" if at_once == 1 else f"{self._done + 1} to {last}"
        self._bar.set_description_str(f"picture {numbers} of {self._bar.total}", refresh=False)
        self._show(0.0)

    def __call__(self, progress: Progress) -> None:
        """Show how far the request is."""
        self._show(progress.fraction)

    def end(self) -> None:
        """End the request."""
        self._done += self._at_once
        self._show(0.0, self._done)

    def _show(self, fraction: float, done: int | None = None) -> None:
        self._bar.n = self._done + fraction * self._at_once if done is None else done
        self._bar.refresh()

    def __enter__(self) -> Self:
        """Return this bar."""
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Wipe the bar."""
        self._bar.close()
