"""A stream of events: partial pictures while they are drawn, then the finished ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from PIL.Image import Image
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tiue_runtime.bundle import UNET_DECODER
from tiue_runtime.serve.answers import as_base64, completed_event, error_event, partial_event, revised_prompt
from tiue_runtime.serve.api_errors import as_api_error
from tiue_runtime.serve.image_request import ImageRequest
from tiue_runtime.serve.jobs import Job, JobProgress, JobQueue

_QUIET = 15.0  # seconds after which a comment tells proxies that the connection lives


class ImageStream(StreamingResponse):
    """The answer of a request with `stream`. The end of the connection cancels the job.

    Args:
        queue: of the request's model.
        name: the job's id.
        wanted: the request.
        tokens: of the prompt.
        metadata: whether pictures hold their record.
        waited: hears how long the job waited, if it ends well.

    Raises:
        QueueFull, QueueClosed, RequestError: as `JobQueue.submit`.
    """

    def __init__(
        self,
        queue: JobQueue,
        name: str,
        wanted: ImageRequest,
        tokens: int,
        *,
        metadata: bool,
        waited: Callable[[float], object],
    ) -> None:
        self._wanted, self._tokens, self._metadata = wanted, tokens, metadata
        self._queue, self._waited = queue, waited
        self._arrived: asyncio.Queue[Callable[[], bytes] | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._shown = set(partial_steps(wanted.drawing.steps or 1, wanted.partial_images))
        self._numbers: dict[int, int] = {}  # picture => its partial events so far
        hears = self._progress if self._shown else None
        self._job = queue.submit(wanted.drawing, id=name, on_progress=hears, on_picture=self._picture)
        self._job.future.add_done_callback(lambda _: self._put(None))
        super().__init__(self._events(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._queue.cancel(self._job)  # does nothing if the job has ended

    def _put(self, make: Callable[[], bytes] | None) -> None:
        """Pass an event on, from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, make)

    def _progress(self, progress: JobProgress) -> None:
        """Hear of progress, on the worker's thread. The preview must be made there; its file is made elsewhere."""
        now, index = progress.progress, progress.index
        if now.stage != UNET_DECODER or now.step not in self._shown:
            return
        has_matrix = self._queue.pipeline.bundle.manifest.preview is not None
        picture = progress.preview(exact=not has_matrix)
        if picture is not None:
            number = self._numbers.get(index, 0)
            self._numbers[index] = number + 1
            self._put(lambda: partial_event(self._wanted, self._file(picture), number, index))

    def _picture(self, job: Job, index: int, picture: Image) -> None:
        """Hear of a finished picture, on the worker's thread."""
        timings, warnings = dict(job.timings), list(job.warnings)
        facts, more = (index, timings, self._tokens, warnings), revised_prompt(picture, self._wanted)
        self._put(lambda: completed_event(self._wanted, self._file(picture), *facts, **more))

    def _file(self, picture: Any) -> str:
        return as_base64(picture, self._wanted, metadata=self._metadata)

    async def _events(self) -> AsyncGenerator[bytes]:
        while True:
            try:
                async with asyncio.timeout(_QUIET):
                    make = await self._arrived.get()
            except TimeoutError:
                yield b": drawing\n\n"
                continue
            if make is None:
                break
            try:
                event = await asyncio.to_thread(make)
            except Exception as error:  # of writing the picture's file
                yield error_event(as_api_error(error).body())
                return
            yield event
        failed = self._job.future.exception()
        if failed is None:
            self._waited(self._job.timings["waiting"])
        else:
            yield error_event(as_api_error(failed).body())


def partial_steps(steps: int, count: int) -> list[int]:
    """Return the timesteps, from 1, after which a partial picture is shown: the first and others evenly after it."""
    count = min(count, steps)
    return [1 + i * steps // count for i in range(count)]
