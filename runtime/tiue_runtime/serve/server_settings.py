"""The settings of the server: limits and permissions, each checked once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tiue_runtime.errors import RequestError, shorten

KEY_VARIABLE = "TIUE_API_KEY"
_ORIGIN = re.compile(r"https?://[^/\s,*]+", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+\]?")


@dataclass(frozen=True)
class ServerSettings:
    """What the server allows.

    Raises:
        RequestError: a value is wrong.
    """

    api_key: str | None = field(default=None, repr=False)  # None: anyone who reaches the server may draw
    hosts: tuple[str, ...] = ()  # names in Host headers that are allowed beside localhost and IP addresses
    origins: tuple[str, ...] = ()  # of pages that may use the server, for example https://draw.example.org
    most_body: int = 2**20  # bytes
    most_prompt: int = 4_000  # characters
    most_pictures: int = 10  # of a request
    most_pixels: int = 2**22  # of a picture
    most_waiting: int = 32  # requests
    batch: int | None = None  # pictures drawn at once; None: 1 on a CPU, 4 on a GPU
    timeout: float = 600.0  # seconds that a request may take, waiting included
    body_seconds: float = 30.0  # until a request's body has arrived
    grace: float = 30.0  # seconds that requests have to end, when the server is told to stop
    kept_pictures: int = 100  # pictures that are kept for answers with URLs
    kept_bytes: int = 2**26
    kept_seconds: float = 3600.0
    metadata: bool = True  # whether pictures hold their record

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
            raise RequestError("api_key: expected printable ASCII characters without spaces at the ends")
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise RequestError(f"allow_origin: expected for example https://example.org, got {shorten(origin)}")
        for host in self.hosts:
            if not _HOST.fullmatch(host):
                raise RequestError(f"allow_host: expected a name without a port, got {shorten(host)}")
        least = {"most_body": 1024, "most_pixels": 256}
        for name in ("most_body", "most_prompt", "most_pictures", "most_pixels", "most_waiting", "kept_pictures"):
            value = getattr(self, name)
            if value < least.get(name, 1):
                raise RequestError(f"{name}: expected at least {least.get(name, 1)}, got {shorten(value)}")
        for name in ("timeout", "body_seconds", "kept_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RequestError(f"{name}: expected seconds greater than 0, got {shorten(getattr(self, name))}")
        if not 0 <= self.grace < float("inf"):
            raise RequestError(f"grace: expected seconds, got {shorten(self.grace)}")
        if self.batch is not None and self.batch < 1:
            raise RequestError(f"batch: expected at least 1, got {shorten(self.batch)}")


def as_sent(origin: str) -> str:
    """Return an origin as browsers send it: in small letters, and without the port that its scheme has anyway."""
    origin = origin.lower()
    return origin.removesuffix(":80" if origin.startswith("http:") else ":443")


def missing(error: ImportError) -> RequestError:
    """Return the error of a package of the extra [server] that is not installed."""
    return RequestError(
        f"the server needs the package {str(error.name).partition('.')[0]}: "
        "pip install starlette uvicorn python-multipart prometheus-client"
    )
