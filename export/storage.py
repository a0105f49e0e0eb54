"""Smaller files: weights stored in float16 or int8. Computation stays in float32."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

BLOCK = 32  # weights per scale: finer than a scale per channel by 9 dB in the default model's text embeddings


def store_float16(graph: ir.Model) -> None:
    """Store float32 matrices and kernels as float16, each with a Cast back, which ONNX Runtime folds at load.

    What float16 cannot hold stays.
    """
    for weight, values in _matrices(graph):
        with np.errstate(over="ignore"):
            halved = values.astype(np.float16)
        if np.isfinite(halved).all():
            stored = ir.val(f"{weight.name}.float16", const_value=ir.tensor(halved))
            _replace(graph, weight, [stored], [_cast(stored)])


def store_int8(graph: ir.Model) -> None:
    """Store float32 matrices as int8 with a float16 scale for every 32 weights of a row, restored as above.

    Weights alone: quantising activations too (ONNX Runtime's dynamic quantisation) left 19 to 28 dB of the default
    model's pictures, where this leaves 36 to 49. Rows that are no multiple of 32, and rows of zeros, stay.
    """
    for weight, values in _matrices(graph):
        if values.shape[-1] % BLOCK:
            continue
        blocks = values.reshape(-1, BLOCK)
        scales = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
        if not (np.isfinite(scales).all() and (scales >= np.finfo(np.float16).tiny).all()):
            continue
        rounded = np.clip(np.rint(blocks / scales.astype(np.float32)), -127, 127).astype(np.int8)
        stored = ir.val(f"{weight.name}.int8", const_value=ir.tensor(rounded))
        scale = ir.val(f"{weight.name}.scale", const_value=ir.tensor(scales))
        shape = ir.val(f"{weight.name}.shape", const_value=ir.tensor(np.array(values.shape, np.int64)))
        wide, factor = _cast(stored), _cast(scale)
        product = ir.node("Mul", [wide.outputs[0], factor.outputs[0]])
        restored = ir.node("Reshape", [product.outputs[0], shape])
        _replace(graph, weight, [stored, scale, shape], [wide, factor, product, restored])


def _matrices(graph: ir.Model) -> Iterator[tuple[ir.Value, NDArray[np.float32]]]:
    """The float32 weights of two axes and more. Vectors weigh nothing and matter more, so they stay as they are."""
    for weight in list(graph.graph.initializers.values()):
        tensor = weight.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) >= 2:
            yield weight, tensor.numpy()


def _cast(value: ir.Value) -> ir.Node:
    return ir.node("Cast", [value], {"to": ir.DataType.FLOAT})


def _replace(graph: ir.Model, weight: ir.Value, stored: Sequence[ir.Value], nodes: Sequence[ir.Node]) -> None:
    """Put `nodes`, the last of which restores `weight` from the initialisers `stored`, in its place and name."""
    (restored,) = nodes[-1].outputs
    restored.shape, restored.dtype = weight.shape, ir.DataType.FLOAT
    ir.convenience.replace_all_uses_with(weight, restored)
    graph.graph.initializers.pop(str(weight.name))
    restored.name = weight.name
    for value in stored:
        graph.graph.register_initializer(value)
    graph.graph.insert_before(graph.graph[0], list(nodes))
