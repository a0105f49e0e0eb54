"""Writing graphs: stripped of what only the exporter's authors read, and external data for the large."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from pathlib import Path

import onnx_ir as ir

EXTERNAL_ABOVE = 10**9  # bytes of weights; a protobuf ends at 2 GiB, and one file is easier to handle


def write_graph(graph: ir.Model, path: Path) -> None:
    """Write `path`, and `<path>.data` beside it if the weights exceed EXTERNAL_ABOVE."""
    _strip(graph)
    weights = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)
    ir.save(graph, path, external_data=f"{path.name}.data" if weights > EXTERNAL_ABOVE else None)


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
