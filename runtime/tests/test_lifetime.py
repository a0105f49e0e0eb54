"""The life of a pipeline: closing, sharing graphs, threads, asyncio, forked and spawned processes."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiue_runtime import Cancelled, Pipeline, RequestError
from tiue_runtime.aio import agenerate, stream

HEART, STAR = "a red heart", "a blue star"
TOO_LONG = 30  # seconds that a child process may take


def pixels(result):
    return [np.asarray(image).tobytes() for image in result.images]


def test_a_request_that_runs_ends_with_its_previews_after_closing(tiny):
    pipe, sizes = Pipeline.load(tiny, device="cpu"), []

    def callback(progress):
        pipe.close()
        if progress.latents is not None:
            sizes.append(progress.preview(exact=True).size)

    assert pipe(HEART, callback=callback).images and (12, 8) in sizes
    with pytest.raises(RequestError, match="this pipeline is closed"):
        pipe.decode(np.zeros((1, 4, 4, 6)))


def test_the_end_of_a_with_block_frees_the_sessions(tiny):
    with Pipeline.load(tiny, device="cpu") as pipe:
        assert pipe(HEART).images
        sessions = [weakref.ref(graph.session()) for graph in pipe.graphs]
        assert all(session() is not None for session in sessions)
    gc.collect()
    assert [session() for session in sessions] == [None] * 4


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: pipe(HEART),
        lambda pipe: pipe.encode(HEART),
        lambda pipe: pipe.decode(np.zeros((1, 4, 4, 6))),
        lambda pipe: pipe.warmup(),
        lambda pipe: asyncio.run(pipe.agenerate(HEART)),
        lambda pipe: pipe.graphs,
    ],
)
def test_a_closed_pipeline_refuses_every_use(tiny, call):
    pipe = Pipeline.load(tiny, device="cpu")
    pipe.close()
    pipe.close()
    with pytest.raises(RequestError, match=r"this pipeline is closed: load the bundle again with Pipeline\.load"):
        call(pipe)


def test_a_request_that_runs_while_its_pipeline_is_closed_ends_well(tiny):
    pipe = Pipeline.load(tiny, device="cpu")
    expected = pixels(pipe(HEART, seed=1, memory="sequential"))
    assert pixels(pipe(HEART, seed=1, callback=lambda progress: pipe.close())) == expected


def test_the_repr_names_bundle_device_and_variant(tiny):
    pipe = Pipeline.load(tiny, device="cpu")
    assert repr(pipe) == "<Pipeline tiny, cpu, portable graphs, vae kl>"
    pipe.close()
    assert repr(pipe).endswith(", closed>")


def test_pipelines_of_one_bundle_share_their_sessions(tiny):
    first, second = Pipeline.load(tiny, device="cpu"), Pipeline.load(tiny, device="cpu")
    other = Pipeline.load(tiny, device="cpu", threads=1)
    low = Pipeline.load(tiny, device="cpu", memory="low")
    assert first.graphs is second.graphs
    assert len({id(pipe.graphs) for pipe in (first, other, low)}) == 3
    first.close()
    assert second(HEART).images


def test_a_bundle_that_was_written_again_is_loaded_again(copy):
    first = Pipeline.load(copy, device="cpu")
    content = (copy / "unet_decoder.onnx").read_bytes()
    (copy / "unet_decoder.onnx").unlink()
    (copy / "unet_decoder.onnx").write_bytes(content)
    assert Pipeline.load(copy, device="cpu").graphs is not first.graphs


def test_eight_threads_make_the_pictures_that_one_makes(tiny):
    pipe = Pipeline.load(tiny, device="cpu")
    wanted = [(prompt, seed) for prompt in (HEART, STAR) for seed in range(16)]
    alone = [pixels(pipe(prompt, seed=seed)) for prompt, seed in wanted]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda one: pixels(pipe(one[0], seed=one[1])), wanted))
    assert together == alone


def test_agenerate_leaves_the_event_loop_free(pipe):
    async def both():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        heart, star = await asyncio.gather(pipe.agenerate(HEART, seed=1), pipe.agenerate(STAR, seed=2))
        ticking.cancel()
        return heart, star, ticks

    heart, star, ticks = asyncio.run(both())
    assert (pixels(heart), pixels(star)) == (pixels(pipe(HEART, seed=1)), pixels(pipe(STAR, seed=2)))
    assert ticks > 1


def test_cancelling_a_task_cancels_its_request(pipe):
    began, ended, stages = threading.Event(), threading.Event(), []

    def callback(progress):
        stages.append(progress.stage)
        began.set()
        time.sleep(0.05)

    def cancel():
        ended.clear()  # Asked while the request runs, and never after it has ended.
        return False

    async def begin_and_cancel():
        task = asyncio.create_task(pipe.agenerate(HEART, callback=callback, cancel=cancel))
        await asyncio.to_thread(began.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        ended.set()
        await asyncio.sleep(0.2)
        return ended.is_set()

    assert asyncio.run(begin_and_cancel()) and len(stages) < 7  # A whole request has seven.


@pytest.mark.parametrize("streamed", [False, True])
def test_a_task_that_is_cancelled_again_and_again_waits_for_its_request(streamed):
    """anyio, and so Starlette and MCP, cancels a task at every turn of the event loop until it ends."""
    began, may_end, ended, complaints = threading.Event(), threading.Event(), [], []

    def pipeline(prompt, *, cancel, **_):
        began.set()
        may_end.wait(TOO_LONG)
        ended.append(cancel())
        raise Cancelled("cancelled")

    async def consume():
        if not streamed:
            return await agenerate(pipeline, HEART)
        parts = stream(pipeline, HEART)
        try:
            return await anext(parts)
        finally:
            await parts.aclose()

    async def cancel_twice():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        task = asyncio.create_task(consume())
        await asyncio.to_thread(began.wait)
        for _ in range(3):
            task.cancel()
            await asyncio.wait([task], timeout=0.01)
        waits = not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert waits and ended == [True]

    asyncio.run(cancel_twice())
    gc.collect()
    assert complaints == []


def test_a_task_that_waits_for_a_thread_is_cancelled_at_once():
    may_end, drawn = threading.Event(), []

    def pipeline(prompt, **_):
        drawn.append(prompt)
        may_end.wait(TOO_LONG)

    async def cancel_second():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        tasks = [asyncio.create_task(agenerate(pipeline, prompt)) for prompt in (HEART, STAR)]
        await asyncio.wait(tasks, timeout=0.05)
        tasks[1].cancel()
        ended, _ = await asyncio.wait(tasks[1:], timeout=5)
        may_end.set()
        await tasks[0]
        assert ended and tasks[1].cancelled()

    asyncio.run(cancel_second())
    assert drawn == [HEART]


def test_a_stream_refuses_a_wrong_callback_at_once(pipe):
    async def show(progress):
        """Nobody would await this."""

    for callback in (5, show):
        with pytest.raises(RequestError, match="callback: expected a function"):
            asyncio.run(anext(stream(pipe, HEART, callback=callback)))


def test_a_wrong_argument_of_agenerate_is_refused(pipe):
    with pytest.raises(RequestError, match="steps: this bundle was trained for"):
        asyncio.run(pipe.agenerate(HEART, steps=3))
    with pytest.raises(RequestError, match="cancel: expected"):
        asyncio.run(pipe.agenerate(HEART, cancel=5))


def test_a_stream_yields_progress_and_the_result(pipe):
    called = []

    async def collect():
        return [item async for item in stream(pipe, HEART, seed=1, callback=called.append)]

    *progress, result = asyncio.run(collect())
    assert len(progress) == 7 and progress == called
    assert pixels(result) == pixels(pipe(HEART, seed=1, memory="sequential"))


def test_a_stream_without_previews_draws_as_a_call_without_a_callback(pipe):
    async def collect():
        return [item async for item in stream(pipe, HEART, seed=1, previews=False)]

    *progress, result = asyncio.run(collect())
    assert [one.stage for one in progress] == ["text_encoder", "unet_encoder", "unet_decoder", "vae_decoder"]
    plain = pipe(HEART, seed=1)
    assert result.memory == plain.memory == "parallel" and pixels(result) == pixels(plain)


def test_leaving_a_stream_early_cancels_its_request(pipe):
    seen = []

    async def leave():
        progress = stream(pipe, HEART, callback=lambda one: (seen.append(one), time.sleep(0.05))[0])
        async for _ in progress:
            break
        await progress.aclose()

    asyncio.run(leave())
    count = len(seen)
    time.sleep(0.2)
    assert len(seen) == count < 7


FORK = """
import os, sys
from tiue_runtime import Pipeline, TiueError, generate
from tiue_runtime.serve.jobs import Drawing, JobQueue
bundle = {bundle!r}
pipe = Pipeline.load(bundle, device="cpu")
queue = JobQueue(pipe)
expected = pipe("a red heart", seed=1).images[0].tobytes()
generate("a red heart", seed=1, bundle=bundle, device="cpu")
if os.fork() == 0:
    assert pipe("a red heart", seed=1).images[0].tobytes() == expected
    assert generate("a red heart", seed=1, bundle=bundle, device="cpu")[0].tobytes() == expected
    try:
        queue.submit(Drawing("a red heart", seed=1))
    except TiueError as error:
        print(error, flush=True)
    queue.close()
    del pipe, queue
    print("child", flush=True)
    sys.exit(0)
assert os.wait()[1] == 0
assert pipe("a red heart", seed=1).images[0].tobytes() == expected
queue.close()
print("parent")
"""

REFUSED = """
import os, sys
from dataclasses import replace
from tiue_runtime import DeviceError, Pipeline
from tiue_runtime.ort import devices
devices.KINDS["cpu"] = replace(devices.KINDS["cpu"], forks=False)  # as the kinds of a GPU
pipe = Pipeline.load({bundle!r}, device="cpu")
if os.fork() == 0:
    try:
        pipe("a red heart")
    except DeviceError as error:
        print(error, flush=True)
    sys.exit(0)
assert os.wait()[1] == 0
"""

SPAWN = """
import multiprocessing
from tiue_runtime import generate

def draw(seed):
    return generate("a red heart", seed=seed, bundle={bundle!r}, device="cpu")[0].tobytes()

if __name__ == "__main__":
    alone = [draw(seed) for seed in range(3)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(draw, range(3)) == alone
    print("same")
"""


def run(script, bundle, tmp_path):
    file = tmp_path / "script.py"
    file.write_text(script.format(bundle=str(bundle)), encoding="utf-8")
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=TOO_LONG, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


needs_fork = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="fork is Linux's way")


@needs_fork
def test_a_forked_process_makes_the_same_pictures_and_ends(tiny, tmp_path):
    refusal, *ended = run(FORK, tiny, tmp_path)[:3]
    assert "make it after the fork" in refusal and ended == ["child", "parent"]


@needs_fork
def test_devices_that_do_not_survive_a_fork_name_the_remedy(tiny, tmp_path):
    assert "load the bundle after the fork, or start processes by the method spawn" in run(REFUSED, tiny, tmp_path)[0]


def test_a_spawned_process_makes_the_same_pictures(tiny, tmp_path):
    assert run(SPAWN, tiny, tmp_path)[0] == "same"


LEFT = """
import threading
from tiue_runtime import Pipeline
from tiue_runtime.serve.jobs import Drawing, JobQueue
queue, begun = JobQueue(Pipeline.load({bundle!r}, device="cpu"), batch=10), threading.Event()
queue.submit(Drawing("a red heart", seed=1, count=10, height=1024, width=1024), on_progress=lambda _: begun.set())
begun.wait()
print("the end")
"""


def test_python_exits_while_a_daemon_thread_draws(tiny, tmp_path):
    assert run(LEFT, tiny, tmp_path)[0] == "the end"


HELD = """
import os, sys, threading
from tiue_runtime.host.forks import ForkSafeLock
lock, held, done = ForkSafeLock(), threading.Event(), threading.Event()

def hold():
    with lock.hold():
        held.set()
        done.wait()

threading.Thread(target=hold, daemon=True).start()
held.wait()
if os.fork() == 0:
    with lock.hold():
        print("free in the child", flush=True)
    os._exit(0)
assert os.wait()[1] == 0
done.set()
with lock.hold():  # A block in which its own thread forks ends well in both processes.
    child = os.fork()
if child == 0:
    os._exit(0)
assert os.wait()[1] == 0
"""


@needs_fork
def test_a_lock_that_another_thread_holds_is_free_in_a_forked_process(tiny, tmp_path):
    assert run(HELD, tiny, tmp_path)[0] == "free in the child"
