"""Translations of PyTorch's operators to ONNX's, where PyTorch's own translation overflows or is not the fastest.

A translation takes the arguments of the PyTorch operator, in its order, and returns ONNX values.
"""

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset18, values

CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators
FLOAT = ir.DataType.FLOAT
op: Any = opset18  # Its type hints forbid Python values, which it takes.
# Between (N, C, H, W) and (N, H, W, C), the layout of CUDA's fast kernels.
TO_CHANNELS_LAST = (0, 2, 3, 1)
TO_CHANNELS_FIRST = (0, 3, 1, 2)
SPLIT_HEADS = (0, 2, 1, 3)  # between (B, S, H, d) and (B, H, S, d), either way

Translations = Mapping[Any, Callable[..., Any]]


def _contrib(name: str, inputs: tuple[str, ...], **attributes: onnx.defs.OpSchema.AttrType) -> Any:
    """Describe an operator of ONNX Runtime, which onnx has no schema for. All inputs but the first are optional."""
    schema = onnx.defs.OpSchema
    option = schema.FormalParameterOption
    types = ("tensor(float)", "tensor(float16)")
    return values.Op(
        values.Opset(CONTRIB, 1),
        name,
        schema(
            name,
            CONTRIB,
            1,
            inputs=[
                schema.FormalParameter(n, f"T_{n}", param_option=option.Optional if i else option.Single)
                for i, n in enumerate(inputs)
            ],
            outputs=[schema.FormalParameter("y", f"T_{inputs[0]}")],
            type_constraints=[(f"T_{n}", types, "") for n in inputs],
            attributes=[schema.Attribute(n, kind, required=False) for n, kind in attributes.items()],
        ),
    )


_INT, _FLOAT = onnx.defs.OpSchema.AttrType.INT, onnx.defs.OpSchema.AttrType.FLOAT
_GROUP_NORM = _contrib(
    "GroupNorm", ("x", "gamma", "beta"), groups=_INT, epsilon=_FLOAT, activation=_INT, channels_last=_INT
)
_ATTENTION = _contrib("MultiHeadAttention", ("query", "key", "value"), num_heads=_INT, scale=_FLOAT)
_GELU = _contrib("Gelu", ("x",))


def _repeat(x: Any, repeats: Any) -> Any:
    """Translate to one Tile. PyTorch's own translation puts an Expand, which copies, before it."""
    return op.Tile(x, op.Concat(*(op.Reshape(n, op.Constant(value_ints=[1])) for n in repeats), axis=0))


def _group_norm_in_float32(
    x: Any, groups: int, weight: Any, bias: Any, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """Translate for x (N, C, H, W) or (N, C, S). Squares above 255 overflow float16, so statistics are in float32."""
    del cudnn_enabled
    grouped = op.Reshape(op.Cast(x, to=FLOAT), op.Constant(value_ints=[0, groups, -1]))
    ones, zeros = op.Constant(value_floats=[1.0] * groups), op.Constant(value_floats=[0.0] * groups)
    normalized = op.Reshape(op.InstanceNormalization(grouped, ones, zeros, epsilon=eps), op.Shape(x))
    per_channel = op.Constant(value_ints=[-1, *[1] * (len(x.shape) - 2)])
    weight, bias = (op.Reshape(op.Cast(v, to=FLOAT), per_channel) for v in (weight, bias))
    return op.Cast(op.Add(op.Mul(normalized, weight), bias), to=x.dtype)


def _attention_in_float32(query: Any, key: Any, value: Any, scale: float) -> Any:
    """Translate for (B, H, S, d). Products of queries and keys of SD 2.x exceed float16; the probabilities do not."""
    factor = op.Constant(value_float=scale)
    scores = op.MatMul(
        op.Mul(op.Cast(query, to=FLOAT), factor), op.Transpose(op.Cast(key, to=FLOAT), perm=[0, 1, 3, 2])
    )
    return op.MatMul(op.Cast(op.Softmax(scores, axis=-1), to=value.dtype), value)


def _group_norm_fused(
    x: Any, groups: int, weight: Any, bias: Any, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """Translate for x (N, C, H, W) or (N, C, S). The kernel takes channels last, four axes and float32 parameters."""
    del cudnn_enabled
    flat = len(x.shape) == 3
    perm = [0, 2, 1] if flat else list(TO_CHANNELS_LAST)
    last = op.Transpose(x, perm=perm)
    middle = op.Constant(value_ints=[2])
    normalized = _GROUP_NORM(
        op.Unsqueeze(last, middle) if flat else last,
        op.Cast(weight, to=FLOAT),
        op.Cast(bias, to=FLOAT),
        groups=groups,
        epsilon=eps,
        activation=0,
        channels_last=1,
    )
    if flat:
        return op.Transpose(op.Squeeze(normalized, middle), perm=perm)
    return op.Transpose(normalized, perm=list(TO_CHANNELS_FIRST))


def _attention_fused(query: Any, key: Any, value: Any, scale: float) -> Any:
    """Translate for (B, H, S, d). Every kernel of the operator adds in float32 and scales before it rounds."""
    heads, size = query.shape[1], query.shape[3]

    def merged(x: Any) -> Any:
        return op.Reshape(op.Transpose(x, perm=list(SPLIT_HEADS)), op.Constant(value_ints=[0, 0, heads * size]))

    out = _ATTENTION(merged(query), merged(key), merged(value), num_heads=heads, scale=scale)
    return op.Transpose(op.Reshape(out, op.Constant(value_ints=[0, 0, heads, size])), perm=list(SPLIT_HEADS))


def _gelu_fused(x: Any, approximate: str = "none") -> Any:
    if approximate != "none":
        raise NotImplementedError(f"gelu with approximate={approximate!r}")
    return _GELU(x)


def _attention(define: Callable[..., Any]) -> Callable[..., Any]:
    """Make the translation of PyTorch's attention from a function of queries, keys, values and their scale."""

    def translate(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if attn_mask is not None or dropout_p or is_causal or enable_gqa:
            raise NotImplementedError("attention with a mask, dropout or grouped queries")
        return define(query, key, value, 1 / sqrt(query.shape[3]) if scale is None else scale)

    return translate


_ATEN: Any = torch.ops.aten
PLAIN: Translations = {_ATEN.repeat.default: _repeat}
# Standard operators, safe in float16.
FLOAT16: Translations = {
    **PLAIN,
    _ATEN.group_norm.default: _group_norm_in_float32,
    _ATEN.scaled_dot_product_attention.default: _attention(_attention_in_float32),
}
# ONNX Runtime's operators with CPU kernels. Attention goes block by block and never holds all scores in memory.
CPU: Translations = {
    **PLAIN,
    _ATEN.scaled_dot_product_attention.default: _attention(_attention_fused),
    _ATEN.gelu.default: _gelu_fused,
}
# ONNX Runtime's operators with CUDA kernels. `export.cuda` rewrites the traced graph further.
CUDA: Translations = {
    **PLAIN,
    _ATEN.group_norm.default: _group_norm_fused,
    _ATEN.scaled_dot_product_attention.default: _attention(_attention_fused),
    _ATEN.gelu.default: _gelu_fused,
}
