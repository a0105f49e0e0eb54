"""A queue of jobs for one pipeline. One worker thread draws them, one after another or in batches.

    with JobQueue(pipeline) as queue:
        job = queue.submit(Drawing("a red heart", seed=1))
        job.future.result().pictures[0].save("heart.png")

`submit` takes functions that hear of progress and of each finished picture. `cancel` ends a job, also while it runs.
asyncio waits with `asyncio.wrap_future(job.future)`.
"""

from __future__ import annotations

import copy
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsFloat, SupportsIndex, cast

from tiue_runtime.errors import Cancelled, RequestError, TiueError, shorten

if TYPE_CHECKING:
    from PIL.Image import Image

    from tiue_runtime.pipeline import Pipeline
    from tiue_runtime.progress import Progress

State = Literal["waiting", "running", "done", "failed", "cancelled"]

_ENDED = 256  # ended jobs that `job` still finds
_FIRST_GUESS = 1.0  # seconds of a picture before any was drawn


class QueueFull(TiueError):
    """As many jobs wait as the queue takes.

    Args:
        message: for people.
        seconds: after which a place is probably free.
    """

    def __init__(self, message: str, seconds: float = 0.0) -> None:  # pickle passes the message alone
        super().__init__(message)
        self.seconds = seconds


class QueueClosed(TiueError):
    """The queue takes no more jobs, because the program ends."""


class Late(Cancelled):
    """The job's time was over before its pictures were finished."""


@dataclass(frozen=True)
class Drawing:
    """What a job draws: picture j of the prompt has seed + j.

    Raises:
        RequestError: seed, count or timeout is no number, or too small. The pipeline checks the rest when it draws.
    """

    prompt: str
    seed: int
    count: int = 1
    steps: int | None = None  # None: the bundle's
    height: int | None = None  # pixels; None: the bundle's
    width: int | None = None
    timeout: float | None = None  # seconds from `submit` to the end

    def __post_init__(self) -> None:
        numbers = ("seed", SupportsIndex, 0), ("count", SupportsIndex, 1), ("timeout", SupportsFloat, 0)
        for name, kind, least in numbers:
            value: object = getattr(self, name)
            fits = isinstance(value, kind) and cast(Any, value) >= least
            if not fits and (name, value) != ("timeout", None):
                raise RequestError(f"{name}: expected a number of at least {least}, got {shorten(value)}")


@dataclass(frozen=True)
class Drawn:
    """The result of a job."""

    pictures: list[Image]
    seeds: tuple[int, ...]
    timings: Mapping[str, float]  # seconds: "waiting", each graph, and "total" without the waiting
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class JobProgress:
    """What the worker has done for one picture of a job."""

    job: Job
    index: int  # of the picture in the job
    progress: Progress  # of the request that draws it
    _row: int = field(repr=False)  # of the picture in that request

    def preview(self, *, exact: bool = False) -> Image | None:
        """Make a picture of what is drawn so far, as `Progress.preview` does. None before the first timestep."""
        return self.progress.preview(self._row, exact=exact)


OnProgress = Callable[[JobProgress], object]
OnPicture = Callable[["Job", int, "Image"], object]


class Job:
    """A job of a queue. Its state is for reading; `JobQueue` changes it.

    `future` gives the Drawn. It raises Cancelled, or its subclass Late, or the error of the pipeline.
    """

    def __init__(self, id: str, drawing: Drawing, on_progress: OnProgress | None, on_picture: OnPicture | None) -> None:
        self.id = id
        self.drawing = drawing
        self.on_progress = on_progress
        self.on_picture = on_picture
        self.state: State = "waiting"
        self.created = time.time()
        self.future: Future[Drawn] = Future()
        self.future.set_running_or_notify_cancel()  # Only the queue cancels, never somebody who waits for it.
        self.fraction = 0.0  # of all its pictures, from 0 to 1
        self.stage: str | None = None  # the graph that ran last
        self.pictures: list[Image] = []  # the finished ones, in order
        self.timings: dict[str, float] = {}
        self.warnings: list[str] = []
        self.begun = time.monotonic()
        self.taken = 0  # pictures that the worker has begun

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to the job."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def late(self) -> bool:
        """Whether the job's time is over."""
        return self.drawing.timeout is not None and time.monotonic() - self.begun > self.drawing.timeout


class JobQueue:
    """A bounded queue, and the thread that draws its jobs.

    Args:
        pipeline: that draws. It stays the caller's, who closes it after the queue.
        most: jobs that may wait, beside the one that runs.
        batch: pictures of equal shape that are drawn at once, also of several jobs.
        on_drawn: called on the worker's thread with the seconds of each stage and the number of pictures, after each
            request of the pipeline.

    Raises:
        RequestError: a number is too small.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        most: int = 32,
        batch: int = 1,
        on_drawn: Callable[[Mapping[str, float], int], object] | None = None,
    ) -> None:
        from tiue_runtime.serve.worker import Worker, hear_warnings

        for name, value in (("most", most), ("batch", batch)):
            if value < 1:
                raise RequestError(f"{name}: expected at least 1, got {value}")
        self.pipeline = pipeline
        self.batch = batch
        self._most = most
        self._jobs: OrderedDict[str, Job] = OrderedDict()  # that have not ended, in the order of their arrival
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._changed = threading.Condition()
        self._accepting = True
        self._closing = False
        self._seconds = _FIRST_GUESS  # of a picture, a moving average
        self._on_drawn = on_drawn
        hear_warnings()
        self._thread = threading.Thread(target=Worker(self, pipeline).work, name="tiue-worker", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """Return this queue. The end of the `with` block cancels all jobs."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def submit(
        self,
        drawing: Drawing,
        *,
        id: str | None = None,
        on_progress: OnProgress | None = None,
        on_picture: OnPicture | None = None,
    ) -> Job:
        """Put a job at the end of the queue.

        Args:
            drawing: what to draw.
            id: of the job; None makes one up.
            on_progress: called on the worker's thread after each part of the work. Previews then come after each
                timestep, because the job is drawn in sequential mode, as `Pipeline.__call__` does with a callback.
            on_picture: called on the worker's thread with the job, the index and the picture, when it is finished.

        Raises:
            QueueFull: too many jobs wait.
            QueueClosed: the queue takes no more jobs.
            RequestError: a job of this id has not ended.
            TiueError: this is a forked process, in which the queue's thread does not exist.
        """
        job = Job(id or secrets.token_hex(12), drawing, on_progress, on_picture)
        with self._changed:
            if not self._accepting:
                raise QueueClosed("the server is shutting down and takes no more requests")
            if not self._thread.is_alive():
                raise TiueError("the queue does not work in a forked process: make it after the fork")
            if job.id in self._jobs:
                raise RequestError(f"id: a job {job.id} is already there; choose another id")
            if self.waiting >= self._most:
                seconds = self.seconds_ahead()
                raise QueueFull(f"{self._most} requests are waiting already; try again in {seconds:.0f} s", seconds)
            self._jobs[job.id] = job  # first: `job` reads without the lock
            self._ended.pop(job.id, None)
            self._changed.notify_all()
        return job

    def job(self, id: str) -> Job | None:
        """Return a job or None. One that ended lately is found without its pictures: its future is cancelled."""
        return self._jobs.get(id) or self._ended.get(id)

    def cancel(self, job: Job | str) -> bool:
        """End a job, whether it waits or runs. Says whether it had not ended. An id means its latest job."""
        found = self._jobs.get(job) if isinstance(job, str) else job
        return found is not None and self.finish(found, Cancelled("the request was cancelled"))

    @property
    def waiting(self) -> int:
        """The number of jobs that wait."""
        return sum(job.state == "waiting" for job in list(self._jobs.values()))

    @property
    def running(self) -> int:
        """The number of jobs that are drawn now."""
        return sum(job.state == "running" for job in list(self._jobs.values()))

    def position(self, job: Job) -> int:
        """Return how many jobs are drawn before this one; 0 if it runs or has ended."""
        return next((place for place, other in enumerate(list(self._jobs.values())) if other is job), 0)

    def seconds_ahead(self) -> float:
        """Estimate the seconds until all pictures that are asked for are drawn, from those drawn lately."""
        left = sum(job.drawing.count - len(job.pictures) for job in list(self._jobs.values()))
        return max(left * self._seconds, 1.0)

    def close(self, seconds: float = 0.0) -> None:
        """Refuse further jobs, give the others some time to end, cancel the rest, and end the worker.

        Args:
            seconds: that jobs have to end.
        """
        with self._changed:
            self._accepting = False
            self._changed.wait_for(lambda: not self._jobs, seconds)
            self._closing = True
            self._changed.notify_all()
            left = list(self._jobs.values())
        for job in left:
            self.finish(job, Cancelled("the server is shutting down"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # What the worker calls.

    def take(self) -> list[tuple[Job, int]]:
        """Wait for work, and take pictures of equal shape: (job, index in the job) each. Empty: the queue closes."""
        with self._changed:
            while True:
                parts = self._next_parts()
                if parts or self._closing:
                    return parts
                self._changed.wait()

    def _next_parts(self) -> list[tuple[Job, int]]:
        self._expire()
        parts: list[tuple[Job, int]] = []
        for job in self._jobs.values():
            if parts and _shape(job) != _shape(parts[0][0]):
                continue
            while job.taken < job.drawing.count and len(parts) < self.batch:
                parts.append((job, job.taken))
                job.taken += 1
                job.state = "running"
                job.timings.setdefault("waiting", time.monotonic() - job.begun)
        return parts

    def stopped(self, jobs: list[Job]) -> bool:
        """Say whether all of these jobs have ended. Ends jobs whose time is over."""
        with self._changed:
            self._expire()
        return all(job.ended for job in jobs)

    def drawn(self, timings: Mapping[str, float], pictures: int) -> None:
        """Hear how long a request of the pipeline took."""
        self._seconds += 0.2 * (timings["total"] / pictures - self._seconds)
        if self._on_drawn:
            self._on_drawn(timings, pictures)

    def finish(self, job: Job, result: Drawn | BaseException) -> bool:
        """End a job with its result or an error. Says whether it had not ended before."""
        with self._changed:
            if job.ended:
                return False
            error = result if isinstance(result, BaseException) else None
            job.state = "done" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"
            job.fraction = 1.0 if error is None else job.fraction
            job.on_progress = job.on_picture = None  # They may hold much of their caller.
            self._ended[job.id] = _without_result(job)
            del self._jobs[job.id]
            while len(self._ended) > _ENDED:
                self._ended.popitem(last=False)
            self._changed.notify_all()
        if isinstance(result, BaseException):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
        return True

    def _expire(self) -> None:
        for job in [job for job in self._jobs.values() if job.late]:
            self.finish(job, Late(f"timeout: the pictures were not finished within {job.drawing.timeout:g} seconds"))


def _without_result(job: Job) -> Job:
    """Return a copy of a job that keeps no picture in memory."""
    ended = copy.copy(job)
    ended.future = Future()
    ended.future.cancel()
    ended.pictures = []
    return ended


def _shape(job: Job) -> tuple[object, ...]:
    drawing = job.drawing
    return drawing.steps, drawing.height, drawing.width, job.on_progress is None
