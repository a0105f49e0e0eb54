"""Writing graphs: stripped of what only the exporter's authors read, and external data for the large."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

import hashlib
from pathlib import Path
from typing import Any

import onnx_ir as ir

EXTERNAL_ABOVE = 10**9  # bytes of weights; a protobuf ends at 2 GiB, and one file is easier to handle
SHARED_ABOVE = 1024  # bytes of a weight that is worth a reference to another file
_PAGE = 65536  # weights begin where every system can map them into memory


class GraphWriter:
    """Writes the graphs of one bundle.

    Weights above EXTERNAL_ABOVE go to `<graph>.data` beside it. Of a bundle with several targets, large or not,
    so that a weight that two graphs have in common is written once.
    """

    def __init__(self, directory: Path, share: bool):
        self.directory = directory
        self.share = share
        self._written: dict[bytes, ir.ExternalTensor] = {}  # by content

    def write(self, graph: ir.Model, name: str) -> None:
        """Write `graph` to the file `name` and its weights, if they are large, to `<name>.data`."""
        _strip(graph)
        weights = [value for value in graph.graph.initializers.values() if value.const_value is not None]
        if self.share or sum(value.const_value.nbytes for value in weights) > EXTERNAL_ABOVE:  # type: ignore[union-attr]
            self._move_out(weights, f"{name}.data")
        ir.save(graph, self.directory / name)

    def _move_out(self, weights: list[ir.Value], data_name: str) -> None:
        new: dict[bytes, list[ir.Value]] = {}  # by content; a name will do where nothing is shared
        for value in weights:
            tensor: Any = value.const_value
            if tensor.nbytes < SHARED_ABOVE:
                continue
            key = _digest(tensor) if self.share else str(value.name).encode()
            if key in self._written:
                value.const_value = _reference(self._written[key], str(value.name), tensor.shape)
            else:
                new.setdefault(key, []).append(value)
        tensors: list[Any] = [values[0].const_value for values in new.values()]
        if not tensors:
            return
        moved = ir.external_data.convert_tensors_to_external(tensors, self.directory, data_name, alignment=_PAGE)
        for (key, values), tensor in zip(new.items(), moved, strict=True):
            for value in values:
                value.const_value = _reference(tensor, str(value.name), tensor.shape)
            if self.share:
                self._written[key] = tensor


def _digest(tensor: Any) -> bytes:
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + tensor.tobytes()).digest()


def _reference(known: ir.ExternalTensor, name: str, shape: Any) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        known.location, known.offset, known.length, known.dtype, shape=shape, name=name, base_dir=known.base_dir
    )


def _strip(graph: ir.Model) -> None:
    """Remove the tracer's notes: a tenth of a small graph, with source paths of the machine that made it."""
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.graph.inputs, *graph.graph.initializers.values()]:
        value.metadata_props.clear()
