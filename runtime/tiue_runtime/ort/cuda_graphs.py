"""CUDA graphs: the kernels of a run are recorded once per shape and launched together from then on.

The demands of ONNX Runtime and CUDA, and the answers:

1. A recorded run reads and writes the addresses it was recorded with. So every shape has buffers of its own: inputs are
   copied into them, and the features that one graph writes are the very buffers that the next one reads.
2. The run option gpu_graph_id selects the recording, one number per shape of a session: ONNX Runtime does not notice
   that a number is used with another shape. -1 runs without; 0, the default, is reserved.
3. Recordings belong to the thread that made them, and while one is made, no other thread may do certain things with
   the GPU. So every run is made by one thread, which `CudaGraphs` owns.
4. The buffers of a shape serve one request at a time, from the first graph to the last: `CudaGraphs.turn`.
5. Memory that a recording uses must not be given back, so no arena is shrunk in these sessions.
"""

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from threading import RLock
from typing import Any, Literal, ParamSpec, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tiue_runtime.ort.sessions import load_onnxruntime, run_options

GRAPH_ID = "gpu_graph_id"
WITHOUT = {GRAPH_ID: "-1"}

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


class CudaGraphs:
    """Shared by the graphs of one pipeline: a thread, the right of one request to record or replay, and buffers."""

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
    def turn(self) -> Generator[None]:
        """Hold the buffers for one request. A request within a request, made by a callback, runs without recordings."""
        with self._lock:
            outer = self.mode
            self.mode = "without" if outer else "record" if self._recording else "replay"
            try:
                yield
            finally:
                self.mode = outer

    @contextmanager
    def recording(self) -> Generator[None]:
        """Record the new shapes of requests that are made within."""
        with self._lock:
            self._recording = True
            try:
                yield
            finally:
                self._recording = False

    def place(self, name: str, array: Any, place: tuple[str, int]) -> Any:
        """Copy an input to the device, for several graphs. If its shape is recorded, the copy goes into the buffer."""
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
        self._session = session
        self._place = place
        self.graphs = graphs
        self._recorded: dict[object, _Recording] = {}
        self._numbers = count(1)  # none is used twice, even if a recording failed

    def __call__(
        self, inputs: Mapping[str, Any], run: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Replay the recording for the shapes of `inputs`, or make it if this is the time to record.

        Args:
            inputs: contiguous arrays, or values in device memory.
            run: runs the session without a recording, and leaves its outputs in device memory.

        Returns:
            Outputs by name in device memory, or None if there is no recording.
        """
        if self.graphs.mode not in ("record", "replay"):
            return None
        # Arrays are told apart by shape, values in device memory by address, because the recording contains addresses.
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
        # The outputs of a run without recording have the right shapes, so they become the buffers to record with.
        outputs = run({**inputs, **buffers})
        binding = self._session.io_binding()
        for name, value in {**inputs, **buffers}.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        recording = _Recording(buffers, outputs, binding, run_options({GRAPH_ID: str(next(self._numbers))}))
        # With a new number this runs until memory settles, records, and launches what it recorded.
        self._session.run_with_iobinding(binding, recording.options)
        return recording


class _Recording:
    """The buffers of one shape. `binding` keeps those alive that other graphs own."""

    def __init__(self, buffers: dict[str, Any], outputs: dict[str, Any], binding: Any, options: Any) -> None:
        self.buffers = buffers
        self.outputs = outputs
        self.binding = binding
        self.options = options


def _signature(value: Any) -> tuple[object, ...]:
    if not _is_array(value):
        return (value.data_ptr(),)
    array = cast(NDArray[Any], value)
    return array.dtype.str, array.shape


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray)


def _buffer(array: Any, place: tuple[str, int]) -> Any:
    """Copy an array to device memory. ortvalue_from_numpy may share the array's own memory; this never does."""
    buffer = load_onnxruntime().OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype, *place)
    buffer.update_inplace(array)
    return buffer
