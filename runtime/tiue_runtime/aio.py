"""Pictures for asyncio: the event loop stays free, and cancelling a task cancels its request.

    result = await agenerate(pipe, "a red heart")
    async for progress in stream(pipe, "a red heart"): ...

Requests run on the event loop's threads. ONNX Runtime shares the CPU cores among them.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from tiue_runtime.errors import Cancelled
from tiue_runtime.options import RequestOptions
from tiue_runtime.progress import Hearing
from tiue_runtime.run import Run

if TYPE_CHECKING:
    from tiue_runtime.pipeline import Pipeline
    from tiue_runtime.progress import Progress
    from tiue_runtime.result import Result


async def agenerate(
    pipeline: "Pipeline",
    prompt: str | Sequence[str] | None = None,
    *,
    output_type: Any = "pil",
    **options: Unpack[RequestOptions],
) -> "Result[Any]":
    """Make pictures without blocking the event loop.

    Args:
        pipeline: a loaded pipeline.
        prompt: as in `Pipeline.__call__`.
        output_type: as in `Pipeline.__call__`.
        **options: as in `Pipeline.__call__`. callback and cancel are called on another thread.

    Returns:
        As `Pipeline.__call__`.

    Raises:
        asyncio.CancelledError: the task was cancelled. The request has ended by then.
        TiueError: as `Pipeline.__call__`.
    """
    stop, began = threading.Event(), threading.Event()
    asked = Run(options.get("cancel")).cancelled
    options["cancel"] = lambda: stop.is_set() or asked()
    call: Any = pipeline

    def draw() -> "Result[Any]":
        began.set()
        return call(prompt, output_type=output_type, **options)

    work = asyncio.create_task(asyncio.to_thread(draw))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        if not began.is_set():
            work.cancel()  # It waits for one of the event loop's threads.
        await _end(work)
        ended = work.exception()
        if ended is not None and not isinstance(ended, Cancelled):
            raise ended from None
        raise


async def stream(
    pipeline: "Pipeline",
    prompt: str | Sequence[str] | None = None,
    *,
    output_type: Any = "pil",
    previews: bool = True,
    **options: Unpack[RequestOptions],
) -> "AsyncGenerator[Progress | Result[Any]]":
    """Make pictures, and yield each Progress as it comes, then the Result.

    Args:
        pipeline: a loaded pipeline.
        prompt: as in `Pipeline.__call__`.
        output_type: as in `Pipeline.__call__`.
        previews: whether previews are made of the Progress. False: memory="auto" chooses as in a call without a
            callback, and Progress comes less often.
        **options: as in `Pipeline.__call__`. A callback is called as well.

    Raises:
        TiueError: as `Pipeline.__call__`. Leaving the loop early, and then `aclose`, cancels the request.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue["Progress | None"]()
    callback = options.get("callback")
    Run(callback=callback)  # checks it now

    def pass_on(progress: "Progress") -> object:
        loop.call_soon_threadsafe(arrived.put_nowait, progress)
        return callback(progress) if callback else None

    options["callback"] = Hearing(pass_on, previews)
    work = asyncio.create_task(agenerate(pipeline, prompt, output_type=output_type, **options))
    work.add_done_callback(lambda _: arrived.put_nowait(None))
    try:
        while (progress := await arrived.get()) is not None:
            yield progress
        yield work.result()
    finally:
        work.cancel()  # does nothing if it has ended
        await _end(work)


async def _end(work: "asyncio.Task[Any]") -> None:
    """Wait until a task has ended, even if the waiting one is cancelled meanwhile, as anyio does again and again."""
    again: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            again = error
    if not work.cancelled():
        work.exception()  # Without this, asyncio would log an error that nobody asked for.
    if again:
        raise again
