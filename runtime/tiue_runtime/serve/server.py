"""The process around the application: the socket, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

from tiue_runtime.errors import RequestError, reason
from tiue_runtime.serve.app import create_app
from tiue_runtime.serve.server_settings import ServerSettings, missing

try:
    import uvicorn
except ImportError as error:
    raise missing(error) from error

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from tiue_runtime.pipeline import Pipeline

_BACKLOG = 128
_CONNECTIONS = 512  # more are answered with 503
_KEEP_ALIVE = 75  # seconds that a connection without a request stays open; longer than clients keep theirs
_UNREAD = 60_000  # milliseconds after which the system closes a connection whose client reads nothing
_AFTER_GRACE = 5  # seconds in which cancelled requests are answered


def serve(
    pipelines: Mapping[str, Pipeline],
    settings: ServerSettings,
    host: str = "127.0.0.1",
    port: int = 8080,
    started: Callable[[str], object] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. A second one cancels what is still drawn.

    Args:
        pipelines: as in `create_app`.
        settings: as in `create_app`.
        host: an address of this machine.
        port: 0 takes a free one.
        started: called with the server's URL, when it listens.

    Raises:
        RequestError: the address cannot be used.
    """
    listening = listen(host, port)
    try:
        server = new_server(create_app(pipelines, settings), settings.grace)
        if started:
            address, number = listening.getsockname()[:2]
            started(f"http://[{address}]:{number}/" if ":" in address else f"http://{address}:{number}/")
        asyncio.run(server.serve(sockets=[listening]))
    finally:
        listening.close()


def new_server(app: Starlette, grace: float) -> OrderlyServer:
    """Return a server of an application of `create_app`.

    Args:
        app: the application.
        grace: seconds that requests have to end, when the server is told to stop.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=round(grace) + _AFTER_GRACE,
        limit_concurrency=_CONNECTIONS,
    )
    return OrderlyServer(config, app.state.endpoints, grace)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address. Raises RequestError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise RequestError(f"host, port: cannot listen at {host!r}, port {port}: {error}") from error
    try:
        if hasattr(signal, "SIGHUP"):  # On Windows, the option would let two programs share a port.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux. Connections inherit it.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        said = reason(error)
        raise RequestError(f"host, port: cannot listen at {host}, port {port}: {said}; choose others") from error
    return listening


class OrderlyServer(uvicorn.Server):
    """uvicorn's server, which ends in order: requests that are there end first, for some time."""

    def __init__(self, config: uvicorn.Config, endpoints: Any, grace: float) -> None:
        super().__init__(config)
        self._endpoints, self._grace = endpoints, grace

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals until the server has ended. Unlike uvicorn's, they do not end the process afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to end, or end at once."""
        again = self.should_exit
        self.should_exit = True
        self._endpoints.ending = True
        grace = 0.0 if again else self._grace
        # Other threads do the rest: a handler may have interrupted the holder of a queue's lock.
        for queue in self._endpoints.queues.values():
            threading.Thread(target=queue.close, args=(grace,), daemon=True).start()
