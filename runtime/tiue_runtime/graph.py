"""A loaded ONNX graph: takes named arrays, returns named arrays, checks both against the contract."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError, InferenceError, OutOfMemoryError, is_out_of_memory
from .sessions import Device, create_session, first_line, shrinking_options

Array = NDArray[Any]
Shape = tuple[int | str | None, ...]  # None or a name where a dimension is dynamic


class Graph:
    """A loaded ONNX graph. Calls from several threads at once are safe."""

    def __init__(self, path: Path, device: Device) -> None:
        """Load `path` on `device`. Raises BundleError for a bad graph, DeviceError for a refused device."""
        self.name = path.stem
        self.device = device
        self._session = create_session(path, device)
        self._options: Any = None
        self.inputs: dict[str, Shape] = {node.name: tuple(node.shape) for node in self._session.get_inputs()}
        self.outputs: tuple[str, ...] = tuple(node.name for node in self._session.get_outputs())

    def __call__(self, feed: Mapping[str, Any], *, keep_on_device: bool = False) -> dict[str, Any]:
        """Run the graph on the entries of `feed` that it has inputs for.

        Values are numpy arrays, or what an earlier call returned with `keep_on_device`: opaque values that
        never leave the device. Returns every output by name. Raises InferenceError, or OutOfMemoryError of its kind.
        """
        place = (self.device.kind, self.device.index) if keep_on_device else ("cpu", 0)
        try:
            binding = self._session.io_binding()
            for name in self.inputs:
                value = feed[name]
                if isinstance(value, np.ndarray):
                    binding.bind_cpu_input(name, np.ascontiguousarray(cast(Array, value)))
                else:
                    binding.bind_ortvalue_input(name, value)
            for name in self.outputs:
                binding.bind_output(name, *place)
            self._session.run_with_iobinding(binding, self._options)
            values = binding.get_outputs()
            return {
                name: value if keep_on_device else value.numpy()
                for name, value in zip(self.outputs, values, strict=True)
            }
        except Exception as error:  # ONNX Runtime's own exceptions share no other base
            if is_out_of_memory(error):
                if self.device.kind == "cpu":
                    # Before it fails, the arena takes most of what is left. From now on it gives back after each run
                    # what the run no longer needs; on a GPU a captured CUDA graph might still need it.
                    self._options = shrinking_options()
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
