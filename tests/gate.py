"""A pipeline that waits, and a real server on a free port: for tests of what happens meanwhile."""

import asyncio
import threading
import time
from contextlib import contextmanager

from tiue_runtime import Cancelled

WAIT = 20  # seconds, for what takes milliseconds


class Gate:
    """A pipeline that waits at each request until the gate is open."""

    def __init__(self, pipeline):
        self.open, self.entered = threading.Event(), threading.Event()
        self.requests = []
        self.pipeline = pipeline

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def __call__(self, prompt, **options):
        if prompt == "":  # the server's first picture, which nobody asked for
            return self.pipeline(prompt, **options)
        self.requests.append((prompt, options))
        self.entered.set()
        while not self.open.wait(0.005):
            if options["cancel"]():
                raise Cancelled("cancelled at the gate")
        return self.pipeline(prompt, **options)


def eventually(condition):
    """Wait until a condition holds."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def running(app, grace=5.0):
    """Serve an application on a free port. Gives its URL."""
    from tiue_runtime.serve.server import listen, new_server

    listening = listen("127.0.0.1", 0)
    server = new_server(app, grace)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.handle_exit(15, None)
        thread.join(WAIT)
        listening.close()
        assert not thread.is_alive()
