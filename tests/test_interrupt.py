"""Graphs that run for ever can be cancelled, interrupted and given a deadline."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from busy import wait_until_busy
from onnx import TensorProto, helper, numpy_helper
from tiue_runtime import Pipeline
from tiue_runtime.bundle import Bundle, write_bundle
from tiue_runtime.errors import Cancelled
from tiue_runtime.ort import interrupt

TINY = Path(__file__).parents[1] / "runtime/tests/data/tiny"
PROMPT = "a red heart"
AT_ONCE = 2.0  # seconds; a call that cannot be interrupted would take for ever


def make_endless(path: Path) -> None:
    """Write a decoder that ends for one timestep, and loops 2**62 times for several: contribution = mid + rounds."""
    node, value = helper.make_node, helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Identity", ["go_on"], ["going_on"]), node("Add", ["before", "one"], ["after"])],
        "body",
        [
            value("round", TensorProto.INT64, []),
            value("go_on", TensorProto.BOOL, []),
            value("before", TensorProto.FLOAT, None),
        ],
        [value("going_on", TensorProto.BOOL, []), value("after", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.float32(1), "one")],
    )
    nodes = [
        node("Size", ["step_index"], ["steps"]),
        node("Sub", ["steps", "single"], ["more"]),
        node("Mul", ["more", "many"], ["rounds"]),
        node("Loop", ["rounds", "", "mid"], ["contribution"], body=body),
    ]
    inputs = [
        value("mid", TensorProto.FLOAT, ["B", 4, "h", "w"]),
        value("step_index", TensorProto.INT64, ["k"]),
        value("step_weight", TensorProto.FLOAT, ["k"]),
    ]
    constants = {"single": np.int64(1), "many": np.int64(2**60)}
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    output = value("contribution", TensorProto.FLOAT, ["B", 4, "h", "w"])
    graph = helper.make_graph(nodes, "decoder", inputs, [output], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


def bundle_with(directory: Path, graph: str, make: Callable[[Path], None]) -> Path:
    """Write the tiny bundle with another graph."""
    for file in TINY.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    make(directory / f"{graph}.onnx")
    write_bundle(directory, replace(Bundle.load(TINY).manifest, name=directory.name))
    return directory


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    return bundle_with(tmp_path_factory.mktemp("endless"), "unet_decoder", make_endless)


@pytest.fixture(scope="module")
def pipe(endless) -> Pipeline:
    return Pipeline.load(endless, device="cpu")


def test_an_event_cancels_a_graph_that_runs(pipe):
    event = threading.Event()
    threading.Timer(0.3, event.set).start()
    begun = time.monotonic()
    with pytest.raises(Cancelled, match="unet_decoder"):
        pipe(PROMPT, memory="parallel", cancel=event)
    assert time.monotonic() - begun < AT_ONCE


def test_a_deadline_reaches_a_graph_that_runs(pipe):
    end = time.monotonic() + 0.3
    with pytest.raises(Cancelled):
        pipe(PROMPT, memory="parallel", cancel=lambda: time.monotonic() > end)
    assert time.monotonic() - end < AT_ONCE


def test_a_pipeline_is_usable_after_a_graph_was_cancelled(pipe):
    before = pipe(PROMPT, seed=1, memory="sequential", output_type="np").images
    end = time.monotonic() + 0.2
    with pytest.raises(Cancelled):
        pipe(PROMPT, memory="parallel", cancel=lambda: time.monotonic() > end)
    np.testing.assert_array_equal(pipe(PROMPT, seed=1, memory="sequential", output_type="np").images, before)


def test_only_the_request_that_was_cancelled_ends(pipe):
    expected = pipe(PROMPT, seed=1, memory="sequential", output_type="np").images
    event, ended = threading.Event(), threading.Event()

    def endless_request() -> None:
        with pytest.raises(Cancelled):
            pipe(PROMPT, memory="parallel", cancel=event)
        ended.set()

    threading.Thread(target=endless_request, daemon=True).start()
    for _ in range(5):
        np.testing.assert_array_equal(pipe(PROMPT, seed=1, memory="sequential", output_type="np").images, expected)
    assert not ended.is_set()
    event.set()
    assert ended.wait(AT_ONCE)


def test_an_error_of_the_cancel_function_ends_the_graph(pipe):
    calls = []

    def broken() -> bool:
        calls.append(None)
        if len(calls) > 6:
            raise ZeroDivisionError
        return False

    with pytest.raises(ZeroDivisionError):
        pipe(PROMPT, memory="parallel", cancel=broken)
    before = threading.active_count()
    pipe(PROMPT, memory="sequential", cancel=threading.Event())
    assert threading.active_count() == before  # The worker of the call that failed is free again.


def test_calls_one_after_another_share_a_thread():
    def workers() -> int:
        return sum(thread.name == "tiue-worker" for thread in threading.enumerate())

    interrupt.interruptible(lambda: None, "call")
    before, interval = workers(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # Threads take turns within every line.
    try:
        for _ in range(5000):
            interrupt.interruptible(lambda: None, "call")
    finally:
        sys.setswitchinterval(interval)
    assert workers() == before


def test_a_pipeline_works_after_a_fork(pipe):
    pipe(PROMPT, seed=1, memory="sequential")  # Leaves an idle worker, which the child has not.
    child = os.fork()
    if not child:
        worked = interrupt.interruptible(lambda: 7, "call") == 7
        os._exit(0 if worked else 1)
    assert os.waitpid(child, 0)[1] == 0


def heed_interrupts() -> None:
    """Undo what a shell does to a command in the background: its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_interrupting_the_command_line_ends_a_graph_that_runs(endless, tmp_path):
    command = [sys.executable, "-m", "tiue_runtime", "generate", PROMPT, "--memory", "parallel", "--bundle"]
    process = subprocess.Popen(
        [*command, endless, "--out", tmp_path / "a.png"], stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    wait_until_busy(process, 3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    said = process.communicate(timeout=10)[1]
    assert time.monotonic() - begun < AT_ONCE
    assert process.returncode == 130 and said.strip() == "tiue-runtime: error: interrupted"


def make_slow_to_load(path: Path) -> None:
    """Write an image decoder whose loading takes minutes: ONNX Runtime computes a chain of constant products."""
    model = onnx.load(TINY / "vae_decoder.onnx")
    node, graph = helper.make_node, model.graph
    small = numpy_helper.from_array(np.array([1e-4], dtype=np.float32))
    graph.initializer.append(numpy_helper.from_array(np.array([3000, 3000]), "size"))
    chain = [node("MatMul", [f"product{i}", "product0"], [f"product{i + 1}"]) for i in range(500)]
    first = node("ConstantOfShape", ["size"], ["product0"], value=small)
    mean = node("ReduceMean", [chain[-1].output[0]], ["mean"], keepdims=0)
    [name] = graph.node[-1].output
    graph.node[-1].output[:] = ["without mean"]
    graph.node.extend([first, *chain, mean, node("Add", ["without mean", "mean"], [name])])
    onnx.save(model, path)


@pytest.fixture(scope="module")
def slow_to_load(tmp_path_factory) -> Path:
    return bundle_with(tmp_path_factory.mktemp("slow"), "vae_decoder", make_slow_to_load)


LOADING = """
import sys
from tiue_runtime import Pipeline
sys.stderr.write("loading\\n")
Pipeline.load(sys.argv[1], device="cpu")
"""


def test_interrupting_a_process_that_loads_ends_it(slow_to_load):
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING, slow_to_load], stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    assert process.stderr is not None and process.stderr.readline() == "loading\n"
    wait_until_busy(process, 3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    assert process.communicate(timeout=10)[1].strip().endswith("KeyboardInterrupt")
    assert time.monotonic() - begun < AT_ONCE


def test_interrupting_the_command_line_that_loads_ends_it(slow_to_load, tmp_path):
    command = [sys.executable, "-m", "tiue_runtime", "generate", PROMPT, "--bundle", slow_to_load]
    process = subprocess.Popen(
        [*command, "--out", tmp_path / "a.png"], stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    wait_until_busy(process, 3)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    assert process.communicate(timeout=10)[1] == "tiue-runtime: error: interrupted\n"
    assert time.monotonic() - begun < AT_ONCE and process.returncode == 130


LEFT_BEHIND = """
import _thread, time
from tiue_runtime.ort.interrupt import for_each, interruptible

def call(*_):
    _thread.interrupt_main()
    time.sleep(0.3)
    print("ended", flush=True)

{}
"""


@pytest.mark.parametrize("calls", ["interruptible(call, 'call')", "for_each(call, [1], 1)"])
def test_python_exits_after_calls_that_were_left_behind(calls):
    """A call of ONNX Runtime that returned while Python shuts down would abort the process."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND.format(calls)], capture_output=True, text=True, preexec_fn=heed_interrupts
    )
    assert set(done.stdout.split()) == {"ended"} and done.stderr.strip().endswith("KeyboardInterrupt")


WITHIN_A_DEADLINE = """
import sys, time
from tiue_runtime import Cancelled, Pipeline
pipe = Pipeline.load(sys.argv[1], device="cpu", memory="low")
begun = time.monotonic()
try:
    pipe("a red heart", timeout=1)
except Cancelled as error:
    print(time.monotonic() - begun, error)
"""


def test_a_deadline_reaches_a_graph_that_loads(slow_to_load):
    """The thread that loads is left behind, and does not keep Python from exiting."""
    command = [sys.executable, "-c", WITHIN_A_DEADLINE, slow_to_load]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    seconds, said = done.stdout.split(maxsplit=1)
    assert float(seconds) < 1 + AT_ONCE and "vae_decoder" in said
    assert done.returncode == 0 and not done.stderr


def test_errors_of_one_item_end_the_rest():
    seen: list[int] = []

    def fail_at_two(item: int) -> None:
        seen.append(item)
        if item == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupt.for_each(fail_at_two, range(1, 9), at_once=1)
    assert seen == [1, 2]
    interrupt.for_each(seen.append, [7, 8, 9], at_once=2)
    assert sorted(seen) == [1, 2, 7, 8, 9]


def test_a_timeout_reaches_a_graph_that_runs(pipe):
    begun = time.monotonic()
    with pytest.raises(Cancelled, match="unet_decoder"):
        pipe(PROMPT, memory="parallel", timeout=0.3)
    assert time.monotonic() - begun < AT_ONCE
    assert pipe(PROMPT, memory="sequential", timeout=60).images


@pytest.mark.parametrize(
    "call", [lambda f: interrupt.interruptible(f, "work"), lambda f: interrupt.for_each(f, [1], 1)]
)
def test_an_error_that_was_handled_keeps_no_memory(call):
    class Array:
        pass

    kept: list[weakref.ref[Array]] = []

    def fail(*_: object) -> None:
        array = Array()
        kept.append(weakref.ref(array))
        raise MemoryError

    gc.disable()
    try:
        with pytest.raises(MemoryError) as caught:
            call(fail)
        del caught
        assert kept[0]() is None
    finally:
        gc.enable()


def test_an_interrupt_right_after_a_call_has_begun_ends_the_call(monkeypatch):
    """A call that is left behind in native code would abort the process when Python ends."""
    ended, stopped = threading.Event(), threading.Event()

    class Calls(interrupt.SimpleQueue):
        def put(self, call):
            super().put(call)
            if call is not None and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt

    def call():
        stopped.wait(10)
        ended.set()

    monkeypatch.setattr(interrupt, "SimpleQueue", Calls)
    monkeypatch.setattr(interrupt, "_idle", [])
    with pytest.raises(KeyboardInterrupt):
        interrupt.interruptible(call, "a call", stop=stopped.set)
    assert ended.is_set()
