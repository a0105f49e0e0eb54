"""Writing graphs to files, without the notes of the tracer, and with the weights of large graphs beside them."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

# Bytes of weights. A protobuf file ends at 2 GiB; below this limit one file is easier to handle.
EXTERNAL_ABOVE = 10**9
# Bytes of a file of weights for browsers. Content delivery networks keep such files, and a page holds one at a time.
WEB_FILE_LIMIT = 2**28
SHARED_ABOVE = 1024  # bytes of a weight that is worth a reference to another file
_PAGE = 65536  # Weights begin at a multiple, where every system can map them into memory.


class GraphWriter:
    """Writes the graphs of one bundle.

    The weights of a graph go to `<graph>.data` beside it if they are larger than a file may be, or if the graphs are
    deduplicated. Weights that do not fit into that file go to `<graph>.2.data` and so on.
    """

    def __init__(self, directory: Path, deduplicate: bool, file_limit: int | None = None):
        """Choose where to write.

        Args:
            directory: of the bundle.
            deduplicate: write a weight that several graphs have only once, as a bundle with several targets needs.
            file_limit: bytes of weights in one file; a single larger weight has a file of its own. None: EXTERNAL_ABOVE
                for the weights in a graph, and no limit for the file beside it.
        """
        self.directory = directory
        self.deduplicate = deduplicate
        self.file_limit = file_limit
        self._written: dict[bytes, ir.ExternalTensor] = {}  # by content

    def write(self, graph: ir.Model, name: str) -> None:
        """Write a graph to the file `name`, which may lie in a folder. The graph is stripped, in place."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _strip(graph)
        weights = list(graph.graph.initializers.values())
        size = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
        if self.deduplicate or size > (self.file_limit or EXTERNAL_ABOVE):
            self._move_out(weights, path)
        ir.save(graph, path)

    def _move_out(self, weights: list[ir.Value], path: Path) -> None:
        new: dict[bytes, list[ir.Value]] = {}  # by content, or by name where nothing is deduplicated
        for value in weights:
            tensor: Any = value.const_value
            if tensor is None or tensor.nbytes < SHARED_ABOVE:
                continue
            key = _digest(tensor) if self.deduplicate else str(value.name).encode()
            if key in self._written:
                value.const_value = _reference(self._written[key], str(value.name), tensor.shape)
            else:
                new.setdefault(key, []).append(value)
        for number, part in enumerate(self._parts(new), 1):
            tensors: list[Any] = [new[key][0].const_value for key in part]
            file = f"{path.name}.data" if number == 1 else f"{path.name}.{number}.data"
            moved = ir.external_data.convert_tensors_to_external(tensors, path.parent, file, alignment=_PAGE)
            for key, tensor in zip(part, moved, strict=True):
                for value in new[key]:
                    value.const_value = _reference(tensor, str(value.name), tensor.shape)
                if self.deduplicate:
                    self._written[key] = tensor

    def _parts(self, weights: Mapping[bytes, list[ir.Value]]) -> Iterator[list[bytes]]:
        """Yield the keys of weights, file by file."""
        part: list[bytes] = []
        total = 0
        for key, values in weights.items():
            tensor: Any = values[0].const_value
            size = -(-tensor.nbytes // _PAGE) * _PAGE
            if part and self.file_limit is not None and total + size > self.file_limit:
                yield part
                part, total = [], 0
            part.append(key)
            total += size
        if part:
            yield part


def _digest(tensor: Any) -> bytes:
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + tensor.tobytes()).digest()


def _reference(known: ir.ExternalTensor, name: str, shape: Any) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        known.location, known.offset, known.length, known.dtype, shape=shape, name=name, base_dir=known.base_dir
    )


def _strip(graph: ir.Model) -> None:
    """Remove the tracer's notes: a tenth of a small graph, with paths of the machine that made it."""
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.graph.inputs, *graph.graph.initializers.values()]:
        value.metadata_props.clear()
