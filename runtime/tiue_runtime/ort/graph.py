"""An ONNX graph: takes named arrays, returns named arrays, checks both against the contract."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tiue_runtime.errors import BundleError, InferenceError, OutOfMemoryError, is_out_of_memory
from tiue_runtime.host.memory import give_back
from tiue_runtime.ort.cuda_graphs import WITHOUT, CudaGraphs, Recordings
from tiue_runtime.ort.devices import Device, Settings
from tiue_runtime.ort.sessions import create_session, first_line, load_onnxruntime, run_options, shrinking_options

Array = NDArray[Any]
Shape = tuple[int | str | None, ...]  # None or a name where a dimension is dynamic


class Graph:
    """An ONNX graph, loaded where it is needed. Calls from several threads at once are safe."""

    def __init__(
        self,
        path: Path,
        device: Device,
        settings: Settings | None = None,
        cuda_graphs: CudaGraphs | None = None,
        *,
        check: "Callable[[Graph], object] | None" = None,
        load: bool = True,
    ) -> None:
        """Take the graph in `path` for `device`, and load it now, or when it is first asked for anything.

        cuda_graphs: what the graphs of a pipeline share whose `settings` have cuda_graphs.
        check: called whenever the graph has been loaded.

        Loading raises BundleError for a bad graph, DeviceError for a refused device or setting, LoadingError, and what
        `check` does.
        """
        self.name = path.stem
        self.device = device
        self._create = lambda: create_session(path, device, settings)
        self._check = check
        self._loading = Lock()
        self._session: Any = None
        self._inputs: dict[str, Shape] | None = None
        self._outputs: tuple[str, ...] = ()
        self._recordings = None if cuda_graphs is None else Recordings(self.session(), device.place, cuda_graphs)
        # Whether the memory of a run stays with the graph for its next one, and so does not count as free.
        self.keeps = device.kind != "cuda" or cuda_graphs is not None
        self._options: Any = None
        if self._recordings is not None:
            self._options = run_options(WITHOUT)
        elif device.kind == "cuda":
            # Each session has an arena of its own: what one keeps, the others lack.
            self._options = shrinking_options(device)
        if load:
            self.session()

    def session(self) -> Any:
        """ONNX Runtime's session of it, loaded if it is not there."""
        with self._loading:
            if self._session is not None:
                return self._session
            session = self._session = self._create()
            self._inputs = {node.name: tuple(node.shape) for node in session.get_inputs()}
            self._outputs = tuple(node.name for node in session.get_outputs())
        if self._check is not None:
            self._check(self)
        return session

    @property
    def loaded(self) -> bool:
        """Whether a session is there."""
        return self._session is not None

    def unload(self) -> None:
        """Let go of the session and its memory, once nobody uses it any more; the next call loads it again."""
        if self._session is not None:
            self._session = None
            give_back()

    @property
    def releases(self) -> bool:
        """Whether a run can give back the memory that the graph would keep."""
        return self.keeps and not self.device.is_gpu

    @property
    def inputs(self) -> Mapping[str, Shape]:
        """The shape of each input."""
        if self._inputs is None:
            self.session()
        return self._inputs or {}

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        if self._inputs is None:
            self.session()
        return self._outputs

    def __call__(
        self, feed: Mapping[str, Any], *, keep_on_device: bool = False, release: bool = False
    ) -> dict[str, Any]:
        """Run the graph on the entries of `feed` that it has inputs for.

        Values are numpy arrays, or what `place` or an earlier call with `keep_on_device` returned: opaque values that
        never leave the device. release: where `releases`, give back the memory of this run, which the graph would keep
        for its next one. Returns every output by name. Raises InferenceError, or OutOfMemoryError of its kind, and
        what loading does.
        """
        self.session()  # what is wrong with the graph is no error of its run
        with self._errors():
            values = {name: feed[name] for name in self.inputs}
            for name, value in values.items():
                if isinstance(value, np.ndarray):
                    values[name] = np.ascontiguousarray(cast(Array, value))
            if self._recordings is None:
                shrink = release and self.device.kind == "cpu"
                options = shrinking_options(self.device) if shrink else self._options
                outputs = self._run(values, keep_on_device, options)
                if release and self.device.kind == "openvino":
                    self.unload()  # has no other way
                return outputs
            return self._recordings.graphs.run(self._replay, self._recordings, values, keep_on_device)

    def place(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """Copy inputs to the device, once for all runs that take them, of this graph and others there.

        On the CPU they are returned as they are. Raises InferenceError, or OutOfMemoryError of its kind.
        """
        if not self.device.is_gpu:
            return dict(arrays)
        with self._errors():
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            if self._recordings is None:
                copy = load_onnxruntime().OrtValue.ortvalue_from_numpy
                return {name: copy(array, *self.device.place) for name, array in contiguous.items()}
            graphs = self._recordings.graphs
            return {
                name: graphs.run(graphs.place, name, array, self.device.place) for name, array in contiguous.items()
            }

    def _replay(self, recordings: Recordings, values: Mapping[str, Any], keep_on_device: bool) -> dict[str, Any]:
        """Run a recorded shape, or record it, or run without."""
        recorded = recordings(values, lambda inputs: self._run(inputs, True, self._options))
        if recorded is None:
            return self._run(values, keep_on_device, self._options)
        return recorded if keep_on_device else {name: value.numpy() for name, value in recorded.items()}

    def _run(self, values: Mapping[str, Any], keep_on_device: bool, options: Any) -> dict[str, Any]:
        """Run without a recording. The run has ended on the device, too, when this returns."""
        session = self.session()
        binding = session.io_binding()
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, *(self.device.place if keep_on_device else ("cpu", 0)))
        try:
            session.run_with_iobinding(binding, options)
        except Exception as error:
            if "memory arena shrink list" not in str(error):
                raise
            # Some allocators that provider options select are no arenas, and then there is none to shrink.
            self._options = None
            session.run_with_iobinding(binding, None)
        outputs = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        return outputs if keep_on_device else {name: value.numpy() for name, value in outputs.items()}

    @contextmanager
    def _errors(self) -> Generator[None]:
        """Turn what ONNX Runtime raises into errors of this package."""
        try:
            yield
        except Exception as error:  # ONNX Runtime's own exceptions share no other base
            if is_out_of_memory(error):
                if self.device.kind == "cpu":
                    # Before it fails, the arena takes most of what is left. From now on it gives back after each run
                    # what the run no longer needs, as it does on a GPU from the first run.
                    self._options = shrinking_options(self.device)
                    self.keeps = False
                elif self.device.kind == "openvino":
                    self.unload()  # what the failed run took would stay, too
                raise OutOfMemoryError(f"{self.name} ran out of memory on {self.device}") from error
            raise InferenceError(f"{self.name} failed on {self.device}: {first_line(error)}") from error

    def expect(self, inputs: set[str], outputs: set[str], needed: set[str] | None = None) -> None:
        """Raise BundleError unless needed <= the inputs <= `inputs`, and outputs <= the outputs."""
        unknown = ", ".join(sorted(set(self.inputs) - inputs))
        if unknown:
            raise BundleError(f"{self.name}: expected inputs among {', '.join(sorted(inputs))}, got {unknown}")
        absent = ((needed or set()) - set(self.inputs)) | (outputs - set(self.outputs))
        if absent:
            names = ", ".join((*self.inputs, *self.outputs))
            raise BundleError(f"{self.name}: expected {', '.join(sorted(absent))}, got only {names}")

    def check_output(self, name: str, value: Array, shape: tuple[int, ...], remedy: str = "") -> None:
        """Raise BundleError if a computed value has another shape, InferenceError with `remedy` if it is not finite."""
        if value.shape != shape:
            raise BundleError(f"{self.name}: expected {name} of shape {shape}, got {value.shape}")
        if not np.isfinite(value).all():
            raise InferenceError(f"{self.name}: {name} has NaN or infinity on {self.device}. {remedy}".rstrip())
