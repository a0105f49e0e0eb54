"""An ONNX graph: named arrays in, named arrays out, both checked against the contract."""

import ctypes
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from tiue_runtime.bundle import TENSORS
from tiue_runtime.errors import (
    BundleError,
    DeviceError,
    InferenceError,
    OutOfMemoryError,
    TiueError,
    clip,
    is_out_of_memory,
)
from tiue_runtime.host.forks import ForkSafeLock, after_fork
from tiue_runtime.host.memory import give_back
from tiue_runtime.ort.cuda_graphs import WITHOUT, CudaGraphs, Recordings
from tiue_runtime.ort.devices import Device, Settings
from tiue_runtime.ort.interrupt import interruptible
from tiue_runtime.ort.sessions import create_session, first_line, load_onnxruntime, run_options, shrinking

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Cancelled = Callable[[], bool]


@dataclass(frozen=True)
class Declared:
    """Type and shape of an input or output, as a graph declares them."""

    dtype: str  # ONNX Runtime's name, for example "tensor(float)"
    shape: tuple[int | str | None, ...]  # None or a name for a dynamic dimension

    def __str__(self) -> str:
        return f"{self.dtype} of {self.rank} dimensions"

    @property
    def rank(self) -> int:
        """The number of dimensions. It is also 0 if the graph declares none."""
        return len(self.shape)

    @property
    def is_numeric(self) -> bool:
        """Whether it is a tensor that numpy can compute with."""
        return self.dtype.startswith("tensor(") and self.dtype != "tensor(string)"


_graphs: "WeakSet[Graph]" = WeakSet()  # of this process


def _after_fork() -> None:
    for graph in list(_graphs):
        graph.after_fork()


after_fork(_after_fork)

_CONTRACT = {name: Declared(f"tensor({dtype})", (None,) * rank) for name, (dtype, rank) in TENSORS.items()}


class Graph:
    """An ONNX graph, loaded when it is needed. Calls from several threads at once are safe."""

    def __init__(
        self,
        path: Path,
        device: Device,
        settings: Settings | None = None,
        cuda_graphs: CudaGraphs | None = None,
        *,
        check: "Callable[[Graph], object] | None" = None,
        check_files: Callable[[], object] | None = None,
        load: bool = True,
    ) -> None:
        """Take a graph.

        Args:
            path: its ONNX file.
            device: where it runs.
            settings: of its sessions.
            cuda_graphs: shared by the graphs of a pipeline, if `settings` have cuda_graphs.
            check: called after each loading. If it raises, the graph is refused.
            check_files: called before each loading.
            load: load now, instead of when the graph is first needed.

        Raises:
            BundleError: the graph is bad.
            DeviceError: the device or a setting was refused.
            LoadingError: memory ran out.
        """
        self.name = path.stem
        self.device = device
        self._create = lambda: create_session(path, device, settings)
        self._check = check
        self._check_files = check_files
        self._loading = ForkSafeLock()
        self._forked = False  # whether this is a process's copy of a graph that its parent made
        self._session: Any = None
        self._inputs: dict[str, Declared] | None = None
        self._outputs: dict[str, Declared] = {}
        self._recordings = None if cuda_graphs is None else Recordings(self.session(), device.place, cuda_graphs)
        # Whether the graph keeps the memory of a run for its next run. Such memory does not count as free.
        self.keeps = device.row.gives_back != "after each run" or cuda_graphs is not None
        self._entries: Mapping[str, str] = {}  # entries of the options of every run
        if self._recordings is not None:
            self._entries = WITHOUT
        elif device.row.gives_back == "after each run":
            # Each session has its own arena. Memory that one keeps is lost to the others.
            self._entries = shrinking(device)
        _graphs.add(self)
        if load:
            self.session()

    def session(self, cancelled: Cancelled | None = None) -> Any:
        """Return ONNX Runtime's session. Load and check it first if necessary. A refused graph is not kept."""
        if self._forked and not self.device.row.forks:
            raise DeviceError(
                f"device: {self.device} does not work in a forked process: load the bundle after the fork, "
                "or start processes by the method spawn"
            )
        with self._loading.hold():
            if self._session is not None:
                return self._session
            if self._check_files is not None:
                self._check_files()
            session = interruptible(self._create, f"loading-{self.name}", cancelled=cancelled)
            self._inputs = {node.name: _declared(node) for node in session.get_inputs()}
            self._outputs = {node.name: _declared(node) for node in session.get_outputs()}
            try:
                if self._check is not None:
                    self._check(self)
            except BaseException:
                self._inputs, self._outputs = None, {}
                raise
            self._session = session
            return session

    @property
    def loaded(self) -> bool:
        """Whether the graph is loaded."""
        return self._session is not None

    def unload(self) -> None:
        """Free the session and its memory as soon as no call uses it. The next call loads it again."""
        if self._session is not None:
            self._session = None
            give_back()

    @property
    def releases(self) -> bool:
        """Whether `release` has an effect: the graph keeps memory that a run can give back."""
        return self.keeps and self.device.row.gives_back in ("on request", "by reloading")

    @property
    def inputs(self) -> Mapping[str, Declared]:
        """Type and shape of each input."""
        if self._inputs is None:
            self.session()
        return self._inputs or {}

    @property
    def outputs(self) -> Mapping[str, Declared]:
        """Type and shape of each output."""
        if self._inputs is None:
            self.session()
        return self._outputs

    def after_fork(self) -> None:
        """Let go of the session in a forked process. The next call loads it again, or is refused.

        The session's threads exist in the parent only. Destroying the session would wait for them forever, so this
        process keeps its copy of the memory until it ends.
        """
        self._forked = True
        if self._session is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))
            self._session = None

    def __call__(
        self,
        feed: Mapping[str, Any],
        *,
        keep_on_device: bool = False,
        release: bool = False,
        cancelled: Cancelled | None = None,
    ) -> dict[str, Any]:
        """Run the graph on those entries of `feed` that are its inputs.

        Args:
            feed: numpy arrays, or values on the device: from `place`, or from a call with `keep_on_device`.
            keep_on_device: return values in the device's memory, without copying them to arrays.
            release: give back the memory of this run, if the graph `releases`. It would keep it for the next run.
            cancelled: returns whether the caller wants to stop. Called several times a second while the graph runs.

        Returns:
            Every output by name.

        Raises:
            InferenceError: the run failed. OutOfMemoryError is a subclass.
            Cancelled: `cancelled` became true.
            BundleError, DeviceError, LoadingError: loading failed.
        """
        self.session(cancelled)  # Load here, so that an error of loading is not reported as one of the run.
        gives_back = self.device.row.gives_back
        entries = shrinking(self.device) if release and gives_back == "on request" else self._entries
        options = run_options(entries)

        def run() -> dict[str, Any]:
            with self._errors():
                values = {name: feed[name] for name in self.inputs}
                for name, value in values.items():
                    if isinstance(value, np.ndarray):
                        values[name] = np.ascontiguousarray(cast(Array, value))
                if self._recordings is None:
                    return self._run(values, keep_on_device, options)
                return self._recordings.graphs.run(self._replay, self._recordings, values, keep_on_device, options)

        def stop() -> None:
            options.terminate = True

        outputs = interruptible(run, self.name, stop=stop, cancelled=cancelled)
        if release and gives_back == "by reloading":
            self.unload()
        return outputs

    def place(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """Copy inputs to the device once, for all runs of this graph and of others on the same device.

        On the CPU, return them unchanged.

        Args:
            arrays: numpy arrays.

        Returns:
            Values for `__call__`.

        Raises:
            InferenceError: the copy failed. OutOfMemoryError is a subclass.
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

    def _replay(
        self, recordings: Recordings, values: Mapping[str, Any], keep_on_device: bool, options: Any
    ) -> dict[str, Any]:
        """Replay a recorded shape, record it, or run without a recording."""
        recorded = recordings(values, lambda inputs: self._run(inputs, True, options))
        if recorded is None:
            return self._run(values, keep_on_device, options)
        return recorded if keep_on_device else {name: value.numpy() for name, value in recorded.items()}

    def _run(self, values: Mapping[str, Any], keep_on_device: bool, options: Any) -> dict[str, Any]:
        """Run without a recording. Return after the run has ended on the device."""
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
            # Provider options may select an allocator without an arena. There is nothing to shrink then.
            self._entries = {}
            session.run_with_iobinding(binding, run_options({}))
        outputs = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        for name, value in outputs.items():
            rank = self.outputs[name].rank
            # ONNX Runtime guarantees the declared type, but not the declared shape.
            if rank and len(value.shape()) != rank:
                raise BundleError(f"{self.name}: expected {name} of {rank} dimensions, got shape {value.shape()}")
        return outputs if keep_on_device else {name: value.numpy() for name, value in outputs.items()}

    @contextmanager
    def _errors(self) -> Generator[None]:
        """Turn exceptions of ONNX Runtime into errors of this package."""
        try:
            yield
        except TiueError:
            raise
        except Exception as error:  # ONNX Runtime's own exceptions share no other base
            if is_out_of_memory(error):
                gives_back = self.device.row.gives_back
                if gives_back == "on request":
                    # Before a run fails, its arena takes most of the remaining memory. From now on, every run gives
                    # back the memory that it no longer needs, as on a GPU.
                    self._entries = shrinking(self.device)
                    self.keeps = False
                elif gives_back == "by reloading":
                    self.unload()  # Otherwise, the memory of the failed run would stay allocated.
                raise OutOfMemoryError(f"{self.name} ran out of memory on {self.device}") from error
            raise InferenceError(f"{self.name} failed on {self.device}: {first_line(error)}") from error

    def expect(
        self,
        inputs: set[str],
        outputs: set[str],
        needed: set[str] | None = None,
        features: Mapping[str, Declared] | None = None,
    ) -> None:
        """Check names, types and ranks of inputs and outputs against the contract.

        Args:
            inputs: names of the contract that the graph may take.
            outputs: names that it must give.
            needed: names that it must take.
            features: outputs of another graph, which are further inputs that this graph may take.

        Raises:
            BundleError: the graph breaks the contract.
        """
        features = features or {}
        unknown = set(self.inputs) - inputs - set(features)
        if unknown:
            known = _some(sorted({*inputs, *features}))
            raise BundleError(f"{self.name}: expected inputs among {known}, got {_some(sorted(unknown))}")
        absent = ((needed or set()) - set(self.inputs)) | (outputs - set(self.outputs))
        if absent:
            got = _some([*self.inputs, *self.outputs])
            raise BundleError(f"{self.name}: expected {', '.join(sorted(absent))}, got only {got}")
        for name, declared in (*self.inputs.items(), *self.outputs.items()):
            if not declared.is_numeric:
                raise BundleError(f"{self.name}: expected {clip(name)} to be a tensor of numbers, got {declared.dtype}")
            wanted = _CONTRACT.get(name) or features.get(name)
            if wanted and (wanted.dtype, wanted.rank) != (declared.dtype, declared.rank):
                raise BundleError(f"{self.name}: expected {clip(name)} as {wanted}, got {declared}")

    def check_output(self, name: str, value: Array, shape: tuple[int, ...], remedy: str = "") -> None:
        """Check a computed value.

        Args:
            name: of the output.
            value: the array.
            shape: the shape that it must have.
            remedy: for values that are not finite.

        Raises:
            BundleError: the shape differs.
            InferenceError: a value is not finite.
        """
        if value.shape != shape:
            raise BundleError(f"{self.name}: expected {clip(name)} of shape {shape}, got {value.shape}")
        if not np.isfinite(value).all():
            raise InferenceError(f"{self.name}: {clip(name)} has NaN or infinity on {self.device}. {remedy}".rstrip())


def _some(names: Iterable[str]) -> str:
    return clip(", ".join(names))


def _declared(node: Any) -> Declared:
    return Declared(str(node.type), tuple(node.shape or ()))
