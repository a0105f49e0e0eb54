"""Rewriting a graph for int8: convolutions and matrix products between QuantizeLinear and DequantizeLinear.

Ranges of activations are measured once, on prompts and noise. They become constants of the graph, so a picture does not
depend on the rest of its batch. Weights have a scale per output channel. Layers that would lose most stay in float.
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx_ir.tape import Tape

from export.execution import Array, in_one_line

# Seven bits: without VNNI, x86 adds two products in 16 bits, which 255 * 127 * 2 exceeds. Saturation would take 5 to
# 8 dB from the default model's latents. The eighth bit would give 2 dB, and its kernels take a quarter longer.
WEIGHT_LEVELS = 64
_LARGEST_COUNT = 2**30  # of a bias; the sums of products are added to it in 32 bits
_OUTPUT_CHANNELS = {"Conv": 0, "MatMul": 1}  # the axis of the weights


@dataclass(frozen=True)
class Range:
    """The values of a tensor in all calibration runs."""

    low: float
    high: float
    mean_square: float

    @property
    def scale(self) -> float:
        """The step of 8 bits that cover the range and 0."""
        return (max(self.high, 0.0) - min(self.low, 0.0)) / 255 or 1.0

    @property
    def zero_point(self) -> int:
        """The integer that stands for 0."""
        return round(-min(self.low, 0.0) / self.scale)

    @property
    def noise(self) -> float:
        """The power of the rounding error, relative to that of the values."""
        return self.scale**2 / 12 / self.mean_square if self.mean_square else 0.0


def quantizable(graph: ir.Model) -> list[ir.Node]:
    """Return the convolutions and matrix products with constant weights, without the graph's first and last."""
    found = [
        node
        for node in graph.graph
        if node.domain == "" and node.op_type in _OUTPUT_CHANNELS and _constant(node.inputs[1]) is not None
    ]
    return found[1:-1]


def calibrate(graph: ir.Model, runs: Iterable[Mapping[str, Array]]) -> tuple[dict[str, Range], list[dict[str, Array]]]:
    """Run a float32 graph, and measure the ranges that `quantize` needs. The graph stays as it was.

    Args:
        graph: the graph.
        runs: inputs by name, for each run.

    Returns:
        Ranges by the name of the tensor, and the outputs of each run by name.
    """
    outputs = [str(value.name) for value in graph.graph.outputs]
    watched = list({str(v.name): v for node in quantizable(graph) for v in _activations(node)}.values())
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
    """Run a float32 graph.

    Args:
        graph: the graph.
        runs: inputs by name, for each run.

    Returns:
        The outputs of each run by name.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "graph.onnx")
        ir.save(graph, path, external_data="graph.data")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Each tensor is reduced to its range as soon as it exists, so that it can be freed: half the memory.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        with in_one_line("a graph cannot run to be quantized"):
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            names = [output.name for output in session.get_outputs()]
            made: list[dict[str, Any]] = [
                dict(zip(names, session.run(names, dict(feeds)), strict=True)) for feeds in runs
            ]
        return made


def quantize(graph: ir.Model, ranges: Mapping[str, Range], floor_db: float) -> int:
    """Quantize the layers whose rounding leaves at least `floor_db` of signal over noise, in place.

    Args:
        graph: of float32.
        ranges: of `calibrate`.
        floor_db: see `signal_db`.

    Returns:
        How many layers were quantized, of those that are `quantizable`.
    """
    chosen = [node for node in quantizable(graph) if signal_db(node, ranges) >= floor_db]
    inputs = [str(node.inputs[0].name) for node in chosen if node.inputs[0]]  # Read before any is replaced.
    rounded: dict[str, ir.Value] = {}
    for node, x in zip(chosen, inputs, strict=True):
        _quantize(graph, node, x, ranges, rounded)
    return len(chosen)


def signal_db(node: ir.Node, ranges: Mapping[str, Range]) -> float:
    """Return the signal over noise in dB after rounding a layer's inputs, weights and output to 8 bits.

    The roundings count as independent of each other.
    """
    scale, _, values = _quantized_weights(node)
    noise = float(np.mean(scale**2)) / 12 / float(np.mean(values**2)) if values.any() else 0.0
    noise += sum(ranges[str(value.name)].noise for value in _activations(node))
    return float(-10 * np.log10(noise)) if noise else float("inf")


def _activations(node: ir.Node) -> list[ir.Value]:
    """Return the tensors that a layer rounds besides its weights. Matrix products return float, unrounded."""
    values = [node.inputs[0], *(node.outputs if node.op_type == "Conv" else ())]
    return [value for value in values if value is not None]


def _quantize(
    graph: ir.Model, node: ir.Node, x: str, ranges: Mapping[str, Range], rounded: dict[str, ir.Value]
) -> None:
    """Quantize one layer.

    Args:
        graph, node: the layer.
        x: the name that its first input had at the start.
        ranges: by the names that tensors had at the start.
        rounded: tensors after 8 bits, by the same names. New ones are added.
    """
    before, axis = Tape(), _OUTPUT_CHANNELS[node.op_type]
    if x not in rounded:
        rounded[x] = _round_trip(graph, before, node.inputs[0], x, ranges[x])
    bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) == 3 else None
    # A channel of tiny weights has larger steps than its weights need, so that 32 bits hold its bias.
    least = 0.0 if bias is None else np.abs(_array(bias)) / (_LARGEST_COUNT * ranges[x].scale)
    scale, quantized, _ = _quantized_weights(node, least)
    replaced = [node.inputs[1]]
    new = [rounded[x], _restored(graph, before, node, 1, quantized, scale, axis)]
    if bias is not None:  # in 32 bits, with the step of the sum
        step = scale * np.float32(ranges[x].scale)
        counted = np.rint(_array(bias) / step).astype(np.int32)
        replaced.append(bias)
        new.append(_restored(graph, before, node, 2, counted, step, 0))
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
    """Round a value to 8 bits: value => the same in float32, after QuantizeLinear and DequantizeLinear."""
    assert value is not None
    parameters = [
        _initializer(graph, f"{name}.scale", np.array(measured.scale, np.float32)),
        _initializer(graph, f"{name}.zero_point", np.array(measured.zero_point, np.uint8)),
    ]
    restored = tape.op("DequantizeLinear", [tape.op("QuantizeLinear", [value, *parameters]), *parameters])
    restored.shape, restored.dtype = value.shape, ir.DataType.FLOAT
    return restored


def _restored(
    graph: ir.Model, tape: Tape, node: ir.Node, index: int, integers: Array, scale: Array, axis: int
) -> ir.Value:
    """Return a float32 value that is stored as integers, for an input of a layer.

    Layers that share a bias do not share its integers, because their steps differ.
    """
    weight = node.inputs[index]
    assert weight is not None
    name = f"{weight.name}.{integers.dtype}"
    if len(weight.uses()) > 1:
        name = f"{name}.{node.outputs[0].name}"
    inputs = [
        _initializer(graph, name, integers),
        _initializer(graph, f"{name}.scale", scale.astype(np.float32)),
        _initializer(graph, f"{name}.zero_point", np.zeros(scale.shape, integers.dtype)),
    ]
    restored = tape.op("DequantizeLinear", inputs, {"axis": axis})
    restored.shape, restored.dtype = weight.shape, ir.DataType.FLOAT
    return restored


def _initializer(graph: ir.Model, name: str, array: Array) -> ir.Value:
    known = graph.graph.initializers.get(name)
    if known is None:
        known = ir.val(name, const_value=ir.tensor(array))
        graph.graph.register_initializer(known)
    return known


def _quantized_weights(node: ir.Node, least: float | Array = 0.0) -> tuple[Array, Array, Array]:
    """Return (scale of each output channel, at least `least`; int8 weights; float32 weights)."""
    values = _array(node.inputs[1])
    axis = _OUTPUT_CHANNELS[node.op_type]
    largest = np.abs(values).max(axis=tuple(i for i in range(values.ndim) if i != axis))
    scale = np.maximum(np.where(largest > 0, largest / WEIGHT_LEVELS, 1), least).astype(np.float32)
    shaped = scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return scale, np.rint(values / shaped).astype(np.int8), values


def _constant(value: ir.Value | None) -> Any:
    return None if value is None or not value.is_initializer() else value.const_value


def _array(value: ir.Value | None) -> Array:
    return _constant(value).numpy().astype(np.float32)
