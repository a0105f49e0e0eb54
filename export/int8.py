"""int8: convolutions and matrix products that compute in 8 bits, between QuantizeLinear and DequantizeLinear.

Ranges of activations are measured once, on real prompts and noise, and are constants of the graph: a picture does not
depend on what is computed beside it. Weights have a scale per output channel. What would lose the most stays in float.
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx_ir.tape import Tape

Array = NDArray[Any]
# Seven bits: without VNNI, x86 adds two products in 16 bits, which 255 * 127 * 2 exceeds. Saturation takes 5 to 8 dB
# from the default model's latents, the eighth bit would give 2, and kernels that keep it take a quarter longer.
WEIGHT_LEVELS = 64
_OUTPUT_CHANNELS = {"Conv": 0, "MatMul": 1}  # the axis of the weights


@dataclass(frozen=True)
class Range:
    """What the values of a tensor were in all calibration runs."""

    low: float
    high: float
    mean_square: float

    @property
    def scale(self) -> float:
        """The step of 8 bits that hold the range and 0."""
        return (max(self.high, 0.0) - min(self.low, 0.0)) / 255 or 1.0

    @property
    def zero_point(self) -> int:
        """What stands for 0."""
        return round(-min(self.low, 0.0) / self.scale)

    @property
    def noise(self) -> float:
        """The power of the rounding error over that of the values."""
        return self.scale**2 / 12 / self.mean_square if self.mean_square else 0.0


def quantisable(graph: ir.Model) -> list[ir.Node]:
    """Convolutions and matrix products with constant weights, but for the first and the last of the graph."""
    found = [
        node
        for node in graph.graph
        if node.domain == "" and node.op_type in _OUTPUT_CHANNELS and _constant(node.inputs[1]) is not None
    ]
    return found[1:-1]


def calibrate(graph: ir.Model, runs: Iterable[Mapping[str, Array]]) -> tuple[dict[str, Range], list[dict[str, Array]]]:
    """Run a float32 graph on each of `runs`, its inputs by name.

    Returns the range of every tensor that `quantise` needs, by name, and each run's outputs.
    """
    outputs = [str(value.name) for value in graph.graph.outputs]
    watched = list({str(v.name): v for node in quantisable(graph) for v in _activations(node)}.values())
    tape = Tape()
    for i, value in enumerate(watched):
        squared = tape.op("ReduceMean", [tape.op("Mul", [value, value])], {"keepdims": 0})
        for j, figure in enumerate(
            (tape.op("ReduceMin", [value], {"keepdims": 0}), tape.op("ReduceMax", [value], {"keepdims": 0}), squared)
        ):
            figure.name, figure.dtype, figure.shape = f"range.{i}.{j}", ir.DataType.FLOAT, ir.Shape([])
            graph.graph.outputs.append(figure)
    graph.graph.extend(tape.nodes)
    try:
        made = evaluate(graph, runs)
    finally:
        del graph.graph.outputs[len(outputs) :]
        graph.graph.remove(tape.nodes, safe=True)
    count = range(len(watched))
    figures = np.array([[[run.pop(f"range.{i}.{j}") for j in range(3)] for i in count] for run in made], np.float64)
    low, high, squares = figures[:, :, 0].min(0), figures[:, :, 1].max(0), figures[:, :, 2].mean(0)
    ranges = {str(v.name): Range(*map(float, (low[i], high[i], squares[i]))) for i, v in enumerate(watched)}
    return ranges, made


def evaluate(graph: ir.Model, runs: Iterable[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Run a float32 graph on each of `runs`, its inputs by name. Returns the outputs of each, by name."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "graph.onnx")
        ir.save(graph, path, external_data="graph.data")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # A range is taken where its tensor is made, which can then go, not at the end: half the memory.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        made: list[dict[str, Any]] = [dict(zip(names, session.run(names, dict(feeds)), strict=True)) for feeds in runs]
        return made


def quantise(graph: ir.Model, ranges: Mapping[str, Range], floor_db: float) -> tuple[int, int]:
    """Quantise, in place, the layers whose rounding leaves at least `floor_db` of signal over noise.

    Returns how many were, of how many.
    """
    nodes = quantisable(graph)
    chosen = [node for node in nodes if signal_db(node, ranges) >= floor_db]
    inputs = [str(node.inputs[0].name) for node in chosen if node.inputs[0]]  # names before any is replaced
    rounded: dict[str, ir.Value] = {}
    for node, x in zip(chosen, inputs, strict=True):
        _quantise(graph, node, x, ranges, rounded)
    return len(chosen), len(nodes)


def signal_db(node: ir.Node, ranges: Mapping[str, Range]) -> float:
    """What the 8 bits of a layer's inputs, weights and output leave: signal over noise, were they independent."""
    scale, _, values = _quantised_weights(node)
    noise = float(np.mean(scale**2)) / 12 / float(np.mean(values**2)) if values.any() else 0.0
    noise += sum(ranges[str(value.name)].noise for value in _activations(node))
    return float(-10 * np.log10(noise)) if noise else float("inf")


def _activations(node: ir.Node) -> list[ir.Value]:
    """What a layer rounds besides its weights. ONNX Runtime's matrix products sum in int32 and return float."""
    values = [node.inputs[0], *(node.outputs if node.op_type == "Conv" else ())]
    return [value for value in values if value is not None]


def _quantise(
    graph: ir.Model, node: ir.Node, x: str, ranges: Mapping[str, Range], rounded: dict[str, ir.Value]
) -> None:
    """x: the name that the first input had; rounded: what has been through 8 bits, by such names."""
    before, axis = Tape(), _OUTPUT_CHANNELS[node.op_type]
    if x not in rounded:
        rounded[x] = _round_trip(graph, before, node.inputs[0], x, ranges[x])
    scale, quantised, _ = _quantised_weights(node)
    replaced = [node.inputs[1]]
    new = [rounded[x], _restored(graph, before, node.inputs[1], quantised, scale, axis)]
    if node.op_type == "Conv" and len(node.inputs) == 3:  # 32 bits, in steps of what is summed
        step = scale * np.float32(ranges[x].scale)
        counted = np.rint(_array(node.inputs[2]) / step).astype(np.int32)
        replaced.append(node.inputs[2])
        new.append(_restored(graph, before, node.inputs[2], counted, step, 0))
    for i, value in enumerate(new):
        node.replace_input_with(i, value)
    for value in replaced:
        if value is not None and not value.uses():
            graph.graph.initializers.pop(str(value.name))
    graph.graph.insert_before(node, list(before.nodes))
    if node.op_type == "Conv":
        _round_output(graph, node.outputs[0], ranges, rounded)


def _round_output(graph: ir.Model, y: ir.Value, ranges: Mapping[str, Range], rounded: dict[str, ir.Value]) -> None:
    after, name, uses = Tape(), str(y.name), list(y.uses())
    result = rounded[name] = _round_trip(graph, after, y, name, ranges[name])
    for user, index in uses:
        user.replace_input_with(index, result)
    for i, output in enumerate(graph.graph.outputs):
        if output is y:
            y.name, result.name = f"{name}.float", name
            graph.graph.outputs[i] = result
    producer = y.producer()
    assert producer is not None
    graph.graph.insert_after(producer, list(after.nodes))


def _round_trip(graph: ir.Model, tape: Tape, value: ir.Value | None, name: str, measured: Range) -> ir.Value:
    """value => to 8 bits and back."""
    assert value is not None
    parameters = [
        _initialiser(graph, f"{name}.scale", np.array(measured.scale, np.float32)),
        _initialiser(graph, f"{name}.zero_point", np.array(measured.zero_point, np.uint8)),
    ]
    restored = tape.op("DequantizeLinear", [tape.op("QuantizeLinear", [value, *parameters]), *parameters])
    restored.shape, restored.dtype = value.shape, ir.DataType.FLOAT
    return restored


def _restored(
    graph: ir.Model, tape: Tape, weight: ir.Value | None, integers: Array, scale: Array, axis: int
) -> ir.Value:
    """A constant that is stored as integers."""
    assert weight is not None
    name = f"{weight.name}.{integers.dtype}"
    inputs = [
        _initialiser(graph, name, integers),
        _initialiser(graph, f"{name}.scale", scale.astype(np.float32)),
        _initialiser(graph, f"{name}.zero_point", np.zeros(scale.shape, integers.dtype)),
    ]
    restored = tape.op("DequantizeLinear", inputs, {"axis": axis})
    restored.shape, restored.dtype = weight.shape, ir.DataType.FLOAT
    return restored


def _initialiser(graph: ir.Model, name: str, array: Array) -> ir.Value:
    known = graph.graph.initializers.get(name)
    if known is None:
        known = ir.val(name, const_value=ir.tensor(array))
        graph.graph.register_initializer(known)
    return known


def _quantised_weights(node: ir.Node) -> tuple[Array, Array, Array]:
    """(scale of each output channel, int8 weights, float32 weights)."""
    values = _array(node.inputs[1])
    axis = _OUTPUT_CHANNELS[node.op_type]
    largest = np.abs(values).max(axis=tuple(i for i in range(values.ndim) if i != axis))
    scale = np.where(largest > 0, largest / WEIGHT_LEVELS, 1).astype(np.float32)
    shaped = scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return scale, np.rint(values / shaped).astype(np.int8), values


def _constant(value: ir.Value | None) -> Any:
    return None if value is None or not value.is_initializer() else value.const_value


def _array(value: ir.Value | None) -> Array:
    return _constant(value).numpy().astype(np.float32)
