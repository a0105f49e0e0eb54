"""Running a graph with ONNX Runtime on the provider that it is for."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from tiue_runtime import bundle
from tiue_runtime.ort.devices import Device
from tiue_runtime.ort.placement import probe
from tiue_runtime.ort.sessions import available_providers, first_line

from export.cuda_definitions import lower
from export.errors import ExportError
from export.working_memory import GraphRun, measured

Array = NDArray[Any]


class GraphSession:
    """A session of one graph, on the provider that the graph is for.

    Without CUDA, the operators of a graph for CUDA are replaced by their definitions, and run on the CPU.

    Attributes:
        inputs: names of the graph's inputs.
        runs: all runs so far, where the system tells how much memory they took.
    """

    def __init__(self, path: Path, variant: str, graph: str):
        self.variant, self.graph = variant, graph
        self.runs: list[GraphRun] = []
        self._problem = f"{graph} cannot be checked"
        with in_one_line(self._problem):
            self._session = _open(path, variant)
        self.inputs = frozenset(value.name for value in self._session.get_inputs())
        self._outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, feeds: Mapping[str, Array], rows: int, latents: int) -> dict[str, Array]:
        """Run the graph.

        Args:
            feeds: inputs by name.
            rows, latents: the size of the run, for its record.

        Returns:
            Outputs by name.

        Raises:
            ExportError: ONNX Runtime cannot run the graph.
        """
        with in_one_line(self._problem):
            values, taken = measured(lambda: cast(list[Array], self._session.run(self._outputs, dict(feeds))))
        if taken:
            self.runs.append(GraphRun(self.variant, self.graph, rows, latents, taken))
        return dict(zip(self._outputs, values, strict=True))


@cache
def cuda_starts() -> bool:
    """Return whether a session starts on a GPU. A wheel that was built for CUDA does not show that there is one."""
    return Device("cuda").provider in available_providers() and not probe(Device("cuda"))


def _open(path: Path, variant: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # A run's memory is freed at its end, so that the memory of the next can be measured.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    if variant != bundle.CUDA:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    if cuda_starts():
        providers = [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
        return ort.InferenceSession(path, options, providers=providers)
    lowered = path.with_name(f".{path.name}.definitions")
    model = ir.load(path)
    lower(model)
    try:
        ir.save(model, lowered)  # beside the files of weights that it names
        return ort.InferenceSession(lowered, options, providers=["CPUExecutionProvider"])
    finally:
        lowered.unlink(missing_ok=True)


@contextmanager
def in_one_line(problem: str) -> Generator[None]:
    """Turn any exception of ONNX Runtime into an ExportError, which says `problem` and ONNX Runtime's first line."""
    try:
        yield
    except Exception as error:  # ONNX Runtime's exceptions share no other base.
        raise ExportError(f"{problem}: {first_line(error)}") from error
