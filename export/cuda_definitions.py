"""The CUDA graphs' operators in standard operators, so that the parity check can run them on any machine.

These are written from the operators' definitions, not from `export.cuda`. They compute in float32, as the kernels do:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from export.translate import CONTRIB, FLOAT, TO_CHANNELS_FIRST, TO_CHANNELS_LAST

_WEIGHTS_FIRST = (0, 3, 1, 2)  # (M, kH, kW, C) => (M, C, kH, kW)


def lower(graph: ir.Model) -> int:
    """Replace the operators that only CUDA has, in place. Returns how many there were."""
    count = 0
    for node in list(graph.graph):
        define = _DEFINITIONS.get(node.op_type) if node.domain == CONTRIB else None
        if define is None:
            continue
        tape = Tape()
        wide = [None if value is None else _cast(tape, value, FLOAT) for value in node.inputs]
        made = define(tape, node, *wide)
        results = [_cast(tape, value, node.inputs[0].dtype if node.inputs[0] else None) for value in made]
        graph.graph.insert_before(node, list(tape.nodes))
        for old, new in zip(node.outputs, results, strict=True):
            if old in graph.graph.outputs:
                new.name, old.name = old.name, None
            new.shape = old.shape
            if old.dtype is not None:
                new.dtype = old.dtype
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.graph.remove(node)
        count += 1
    return count


def _nhwc_conv(tape: Tape, node: ir.Node, x: Any, weight: Any, bias: Any = None) -> list[ir.Value]:
    inputs = [_transpose(tape, x, TO_CHANNELS_FIRST), _transpose(tape, weight, _WEIGHTS_FIRST)]
    y = tape.op("Conv", [*inputs, *([] if bias is None else [bias])], dict(node.attributes))
    return [_transpose(tape, y, TO_CHANNELS_LAST)]


def _group_norm(tape: Tape, node: ir.Node, x: Any, gamma: Any, beta: Any) -> list[ir.Value]:
    groups, epsilon = node.attributes["groups"].as_int(), node.attributes["epsilon"].as_float()
    first = _transpose(tape, x, TO_CHANNELS_FIRST)
    grouped = tape.op("Reshape", [first, _ints(tape, 0, groups, -1)])
    mean = tape.op("ReduceMean", [grouped, _ints(tape, 2)])
    centered = tape.op("Sub", [grouped, mean])
    variance = tape.op("ReduceMean", [tape.op("Mul", [centered, centered]), _ints(tape, 2)])
    deviation = tape.op("Sqrt", [tape.op("Add", [variance, _floats(tape, epsilon)])])
    flat = tape.op("Reshape", [tape.op("Div", [centered, deviation]), tape.op("Shape", [first])])
    last = _transpose(tape, flat, TO_CHANNELS_LAST)
    y = tape.op("Add", [tape.op("Mul", [last, gamma]), beta])
    if node.attributes["activation"].as_int():
        y = tape.op("Mul", [y, tape.op("Sigmoid", [y])])
    return [y]


def _skip_group_norm(
    tape: Tape, node: ir.Node, x: Any, gamma: Any, beta: Any, skip: Any, bias: Any = None
) -> list[ir.Value]:
    total = tape.op("Add", [x, skip])
    if bias is not None:
        total = tape.op("Add", [total, bias])
    return [*_group_norm(tape, node, total, gamma, beta), total]


def _bias_split_gelu(tape: Tape, node: ir.Node, x: Any, bias: Any) -> list[ir.Value]:
    both = tape.op("Add", [x, bias])
    left, gate = tape.op_multi_out("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    erf = tape.op("Erf", [tape.op("Mul", [gate, _floats(tape, 0.5**0.5)])])
    gelu = tape.op("Mul", [tape.op("Mul", [gate, _floats(tape, 0.5)]), tape.op("Add", [erf, _floats(tape, 1.0)])])
    return [tape.op("Mul", [left, gelu])]


def _bias_add(tape: Tape, node: ir.Node, x: Any, bias: Any, skip: Any) -> list[ir.Value]:
    return [tape.op("Add", [tape.op("Add", [x, bias]), skip])]


_DEFINITIONS: dict[str, Callable[..., list[ir.Value]]] = {
    "NhwcConv": _nhwc_conv,
    "GroupNorm": _group_norm,
    "SkipGroupNorm": _skip_group_norm,
    "BiasSplitGelu": _bias_split_gelu,
    "BiasAdd": _bias_add,
}


def _transpose(tape: Tape, value: Any, perm: tuple[int, ...]) -> ir.Value:
    return tape.op("Transpose", [value], {"perm": list(perm)})


def _cast(tape: Tape, value: ir.Value, dtype: Any) -> ir.Value:
    return value if value.dtype == dtype else tape.op("Cast", [value], {"to": dtype})


def _ints(tape: Tape, *values: int) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.array(values, np.int64))})


def _floats(tape: Tape, *values: float) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.array(values, np.float32))})
