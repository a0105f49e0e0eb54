"""Pictures that answers name by a URL: in memory, for a limited time and up to a limited number."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from typing import NamedTuple


class Kept(NamedTuple):
    """A picture's file."""

    data: bytes
    media_type: str
    until: float  # seconds of time.monotonic


class KeptPictures:
    """The last pictures of answers with URLs. Whoever knows a picture's name may fetch it; names cannot be guessed."""

    def __init__(self, most: int, most_bytes: int, seconds: float) -> None:
        self._most, self._most_bytes, self._seconds = most, most_bytes, seconds
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0

    def keep(self, data: bytes, format: str) -> str:
        """Keep a picture, and return its name. The oldest ones make room."""
        name = f"{secrets.token_urlsafe(24)}.{format}"
        self._kept[name] = Kept(data, f"image/{format}", time.monotonic() + self._seconds)
        self._bytes += len(data)
        self._forget()
        return name

    def get(self, name: str) -> Kept | None:
        """Return a picture, or None if there is none of that name any more."""
        self._forget()
        return self._kept.get(name)

    def _forget(self) -> None:
        now = time.monotonic()
        while self._kept:
            oldest = next(iter(self._kept.values()))
            room = len(self._kept) <= self._most and (self._bytes <= self._most_bytes or len(self._kept) == 1)
            if room and oldest.until > now:
                return
            self._bytes -= len(self._kept.popitem(last=False)[1].data)
