"""Smaller files: float16 storage and int8 text encoders. Computation stays in float32."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic

from .files import write_graph
from .quiet import quiet


def store_float16(graph: ir.Model) -> None:
    """Store float32 matrices and kernels as float16, each with a Cast back, which ONNX Runtime folds at load.

    Vectors (biases, normalisation) stay: they weigh nothing and matter more. So does what float16 cannot
    hold.
    """
    for weight in list(graph.graph.initializers.values()):
        tensor = weight.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
            continue
        with np.errstate(over="ignore"):
            halved = tensor.numpy().astype(np.float16)
        if not np.isfinite(halved).all():
            continue
        stored = ir.val(f"{weight.name}.float16", const_value=ir.tensor(halved))
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
        (restored,) = cast.outputs
        restored.shape, restored.dtype = weight.shape, ir.DataType.FLOAT
        ir.convenience.replace_all_uses_with(weight, restored)
        graph.graph.initializers.pop(str(weight.name))
        restored.name = weight.name
        graph.graph.register_initializer(stored)
        graph.graph.insert_before(graph.graph[0], cast)


def quantize_text_encoder(graph: ir.Model) -> ir.Model:
    """int8 weights for matrix products and embeddings, with activations quantised as they come."""
    with TemporaryDirectory() as directory, quiet():
        before, after = Path(directory) / "before.onnx", Path(directory) / "after.onnx"
        write_graph(graph, before)
        quantize_dynamic(
            before,
            after,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        quantized = ir.load(after)
        ir.external_data.load_to_model(quantized)
    return quantized
