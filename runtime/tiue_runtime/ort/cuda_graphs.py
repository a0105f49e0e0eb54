"""CUDA graphs: the kernels of a run are recorded once per shape. Later runs of that shape launch them all at once.

The constraints of ONNX Runtime and CUDA, and how this module meets them:

1. A recording reads and writes fixed addresses. Each shape therefore has its own buffers. Inputs are copied into them,
   and the decoder reads features directly from the buffers that the encoder writes.
2. The run option gpu_graph_id selects a recording by its number. ONNX Runtime does not check that a number always means
   the same shape. Each shape of a session has its own number. Number -1 runs without a recording. 0 is reserved.
3. A recording belongs to the thread that made it. During a recording, other threads must not use some functions of the
   GPU. Therefore `CudaGraphs` owns one thread, and all runs happen on it.
4. Buffers hold the data of one request. `CudaGraphs.turn` reserves them from the first graph of a request to the last.
5. The memory of a recording must stay allocated. No arena is shrunk in these sessions.
"""

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from threading import RLock
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tiue_runtime.ort.interrupt import POLL_SECONDS
from tiue_runtime.ort.sessions import load_onnxruntime, run_options

GRAPH_ID = "gpu_graph_id"
WITHOUT = {GRAPH_ID: "-1"}

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


class CudaGraphs:
    """The shared state of the graphs of one pipeline: a thread, a lock for one request at a time, and input buffers."""

    def __init__(self) -> None:
        self.mode: Literal["record", "replay", "without"] | None = None  # None between turns
        self._thread = ThreadPoolExecutor(1, "tiue-cuda-graphs")
        self._lock = RLock()
        self._recording = False
        self._inputs: dict[object, Any] = {}

    def run(
        self, function: Callable[Parameters, Returned], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Returned:
        """Call a function on the thread that owns the recordings."""
        return self._thread.submit(function, *args, **kwargs).result()

    @contextmanager
    def turn(self, check: Callable[[], object] = lambda: None) -> Generator[None]:
        """Reserve the buffers for one request. A nested request, made by a callback, runs without recordings.

        `check` is called while other requests have them. It may raise.
        """
        while not self._lock.acquire(timeout=POLL_SECONDS):
            check()
        outer = self.mode
        try:
            self.mode = "without" if outer else "record" if self._recording else "replay"
            yield
        finally:
            self.mode = outer
            self._lock.release()

    @contextmanager
    def recording(self) -> Generator[None]:
        """Record the new shapes of all requests in this `with` block."""
        with self._lock:
            self._recording = True
            try:
                yield
            finally:
                self._recording = False

    def place(self, name: str, array: Any, place: tuple[str, int]) -> Any:
        """Copy an input of several graphs to the device. An input of a recorded shape goes into the shape's buffer."""
        key = name, *_signature(array)
        if self.mode == "record" and key not in self._inputs:
            self._inputs[key] = _buffer(array, place)
        if self.mode not in ("record", "replay") or key not in self._inputs:
            return load_onnxruntime().OrtValue.ortvalue_from_numpy(array, *place)
        self._inputs[key].update_inplace(array)
        return self._inputs[key]


class Recordings:
    """The recorded shapes of one session. Only the thread of its CudaGraphs may use them."""

    def __init__(self, session: Any, place: tuple[str, int], graphs: CudaGraphs) -> None:
        self._session, self._place, self.graphs = session, place, graphs
        self._recorded: dict[object, _Recording] = {}
        self._numbers = count(1)  # No number is used twice, even after a failed recording.

    def __call__(
        self, inputs: Mapping[str, Any], run: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Replay the recording for the shapes of `inputs`. In the mode "record", make it first if there is none.

        Args:
            inputs: contiguous arrays, or values in device memory.
            run: runs the session without a recording. Its outputs are in device memory, too.

        Returns:
            Outputs by name, or None if there is no recording.
        """
        if self.graphs.mode not in ("record", "replay"):
            return None
        # The key of an array is its shape. The key of a value in device memory is its address, which is recorded.
        key = tuple((name, *_signature(value)) for name, value in inputs.items())
        recording = self._recorded.get(key)
        if recording is None:
            if self.graphs.mode == "replay":
                return None
            recording = self._record(inputs, run)
            self._recorded[key] = recording
        else:
            for name, buffer in recording.buffers.items():
                buffer.update_inplace(inputs[name])
            self._session.run_with_iobinding(recording.binding, recording.options)
        return recording.outputs

    def _record(self, inputs: Mapping[str, Any], run: Callable[[Mapping[str, Any]], dict[str, Any]]) -> "_Recording":
        buffers = {name: _buffer(value, self._place) for name, value in inputs.items() if _is_array(value)}
        # A run without a recording makes outputs of the right shapes. They become the output buffers of the recording.
        outputs = run({**inputs, **buffers})
        binding = self._session.io_binding()
        for name, value in {**inputs, **buffers}.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        recording = _Recording(buffers, outputs, binding, run_options({GRAPH_ID: str(next(self._numbers))}))
        # With a new number, ONNX Runtime runs until its memory use is stable, records, and launches the recording.
        self._session.run_with_iobinding(binding, recording.options)
        return recording


class _Recording(NamedTuple):
    """The buffers of one shape. `binding` keeps the buffers of other graphs alive."""

    buffers: dict[str, Any]
    outputs: dict[str, Any]
    binding: Any
    options: Any


def _signature(value: Any) -> tuple[object, ...]:
    if not _is_array(value):
        return (value.data_ptr(),)
    array = cast(NDArray[Any], value)
    return array.dtype.str, array.shape


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray)


def _buffer(array: Any, place: tuple[str, int]) -> Any:
    """Copy an array to new device memory. ortvalue_from_numpy, in contrast, may share the array's own memory."""
    buffer = load_onnxruntime().OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype, *place)
    buffer.update_inplace(array)
    return buffer
