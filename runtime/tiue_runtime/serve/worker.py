"""The worker of a queue: it draws pictures of equal shape, and tells their jobs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tiue_runtime.errors import InferenceError, RequestError
from tiue_runtime.host.forks import FILTERS
from tiue_runtime.progress import Hearing
from tiue_runtime.serve.jobs import Drawn, Job, JobProgress, JobQueue

if TYPE_CHECKING:
    from tiue_runtime.pipeline import Pipeline
    from tiue_runtime.progress import Progress
    from tiue_runtime.result import Result

Part = tuple[Job, int]
"""A job, and the index of one of its pictures."""

_RECORD = "tiue"  # the key of a picture's record in `Image.info`


_heard = threading.local()  # its `sink` gets the warnings of a thread, if there is one


def hear_warnings() -> None:
    """Give warnings of drawing to their jobs, for the rest of this process. Others are shown as before."""
    with FILTERS.hold():
        show: Any = warnings.showwarning
        if getattr(show, "func", None) is not _hear:
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = partial(_hear, show)


def _hear(show: Callable[..., object], message: Warning | str, *others: Any, **named: Any) -> None:
    """Keep a warning if this thread draws, else show it."""
    sink = getattr(_heard, "sink", None)
    if sink is None:
        show(message, *others, **named)
    else:
        sink.append(message)


class Worker:
    """Draws the jobs of a queue on one thread."""

    def __init__(self, queue: JobQueue, pipeline: Pipeline) -> None:
        self._queue, self._pipeline = queue, pipeline

    def work(self) -> None:
        """Draw until the queue closes."""
        while self._draw_next():
            pass

    def _draw_next(self) -> bool:
        """Draw what comes next. Says whether there was anything. No variable keeps a job while the worker waits."""
        parts = self._queue.take()
        if parts:
            self._draw(parts)
        return bool(parts)

    def _draw(self, parts: list[Part], warned: Sequence[Warning | str] = ()) -> None:
        """Draw some pictures. Errors and warnings go to the jobs."""
        jobs = list(dict.fromkeys(job for job, _ in parts))
        heard = list(warned)
        _heard.sink = heard
        try:
            result = self._request(parts, jobs)
        except (InferenceError, RequestError) as error:
            if len(parts) > 1:  # A picture alone may fit into memory, and one that overflows is not the others' fault.
                warnings.warn(f"{len(parts)} pictures cannot be drawn together, but one by one", stacklevel=2)
                for part in parts:
                    if not part[0].ended:
                        self._draw([part], heard)
                return
            self._fail(jobs, error)
        except Exception as error:  # of the pipeline, or of a caller's function; the next job must be drawn
            self._fail(jobs, error)
        else:
            try:
                self._queue.drawn(result.timings, len(parts))
            except Exception as error:  # of the caller's function
                self._fail(jobs, error)
            self._deliver(parts, jobs, result, heard)
        finally:
            _heard.sink = None

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        for job in jobs:
            self._queue.finish(job, error)

    def _request(self, parts: list[Part], jobs: list[Job]) -> Result[list[Any]]:
        """Ask the pipeline for pictures: consecutive seeds of a job as one request, else with noise of their seeds."""
        drawing, first = parts[0][0].drawing, parts[0][1]

        options: dict[str, Any] = {
            "steps": drawing.steps,
            "height": drawing.height,
            "width": drawing.width,
            "callback": Hearing(partial(self._report, parts), previews=jobs[0].on_progress is not None),
            "cancel": lambda: self._queue.stopped(jobs),
        }
        draw: Any = self._pipeline
        if len(jobs) == 1:
            return draw(drawing.prompt, num_images=len(parts), seed=drawing.seed + first, **options)
        seeds = [job.drawing.seed + index for job, index in parts]
        result = draw([self._drawn(*part) for part in parts], latents=self._noise(drawing, seeds), **options)
        for picture, seed in zip(result.images, seeds, strict=True):
            # The pipeline does not know the seeds of noise that it is given. A picture's place in the batch does not
            # matter, so each is recorded as the first.
            picture.info[_RECORD] = replace(picture.info[_RECORD], seed=seed, index=0)
        return result

    def _drawn(self, job: Job, index: int) -> str:
        """Return the prompt of a picture, with its style."""
        return self._pipeline.bundle.manifest.in_style(job.drawing.prompt, job.drawing.seed + index)

    def _noise(self, drawing: Any, seeds: Sequence[int]) -> Any:
        """Return z_T of several seeds, float32 (B, C, h, w)."""
        import numpy as np

        from tiue_runtime.noise import gaussian

        manifest = self._pipeline.bundle.manifest
        scale = manifest.pixels_per_latent
        height, width = drawing.height or manifest.default_height, drawing.width or manifest.default_width
        shape = manifest.latent_channels, height // scale, width // scale
        return np.stack([gaussian(seed, shape) for seed in seeds])

    def _report(self, parts: list[Part], progress: Progress) -> None:
        for row, (job, index) in enumerate(parts):
            job.stage = progress.stage
            job.fraction = max(job.fraction, (index + progress.fraction) / job.drawing.count)
            hears = job.on_progress
            if hears is not None and not job.ended:
                try:
                    hears(JobProgress(job, index, progress, row))
                except Exception as error:  # of the caller's function
                    self._queue.finish(job, error)

    def _deliver(
        self, parts: list[Part], jobs: list[Job], result: Result[list[Any]], heard: Sequence[Warning | str]
    ) -> None:
        for job in jobs:
            _add(job.timings, result.timings)
        for (job, index), picture in zip(parts, result.images, strict=True):
            if job.ended:
                continue
            job.pictures.append(picture)
            for one in heard:
                own = getattr(one, "prompt", None) in (None, self._drawn(job, index))
                if own and str(one) not in job.warnings:
                    job.warnings.append(str(one))
            tell = job.on_picture
            try:
                if tell is not None:
                    tell(job, index, picture)
            except Exception as error:  # of the caller's function
                self._queue.finish(job, error)
        for job in jobs:
            drawing = job.drawing
            if len(job.pictures) == drawing.count:
                seeds = tuple(range(drawing.seed, drawing.seed + drawing.count))
                self._queue.finish(job, Drawn(job.pictures, seeds, dict(job.timings), tuple(job.warnings)))


def _add(sums: dict[str, float], timings: Mapping[str, float]) -> None:
    for stage, seconds in timings.items():
        sums[stage] = sums.get(stage, 0.0) + seconds
