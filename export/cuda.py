"""Rewriting a traced graph for CUDA: channels last, and one node where one kernel does the work of several.

The graph was traced with `translate.CUDA`, which gives GroupNorm, MultiHeadAttention and Gelu. The rules, in this
order:

1. Conv -> NhwcConv, with weights (M, kH, kW, C). Element-wise operators, Concat, Resize and Tile take the layout of
   their inputs. The Transposes between them vanish.
2. Reshape, Reshape -> nothing, where attention splits heads that MultiHeadAttention takes merged.
3. GroupNorm, x * Sigmoid(x) -> GroupNorm with its activation.
4. Add, GroupNorm -> SkipGroupNorm, which also returns the sum.
5. MatMul, Add bias, Split, x * Gelu(y) -> MatMul, BiasSplitGelu, at the widths that have a kernel.
6. Add bias, Add -> BiasAdd, at the widths that have a kernel. This rule leaves out the inputs of a
   LayerNormalization, which ONNX Runtime fuses itself.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.translate import CONTRIB, TO_CHANNELS_FIRST, TO_CHANNELS_LAST

# Operators of any layout, as long as all their inputs have the same.
_FOLLOWERS = ("Add", "Sub", "Mul", "Div", "Sigmoid", "Relu", "Tanh", "Cast", "Concat", "Resize", "Tile")
# The channels for which ONNX Runtime has compiled these kernels.
_SPLIT_GELU_WIDTHS = (2560, 5120, 10240)
_BIAS_ADD_WIDTHS = (320, 640, 1280)


def fuse(graph: ir.Model) -> int:
    """Apply the rules above to a graph, in place. Returns how often a rule applied."""
    count = 0
    for rule in (
        _move_channels_last,
        _keep_heads_merged,
        _fuse_silu,
        _fuse_skip,
        _fuse_split_gelu,
        _fuse_bias_add,
    ):
        count += rule(graph.graph)
        RemoveUnusedNodesPass()(graph)
    for node in graph.graph:
        for value in node.outputs:
            if value.dtype is None and node.inputs[0] is not None:  # Made by these rules; it keeps its input's type.
                _describe(value, value.shape, node.inputs[0].dtype)
    return count


def _move_channels_last(graph: ir.Graph) -> int:
    count = 0
    for node in list(graph):
        if node.op_type == "Conv" and len(_shape(node.inputs[1])) == 4:
            _convolve_channels_last(graph, node)
            count += 1
        elif node.op_type == "Transpose" and _perm(node) == TO_CHANNELS_LAST:
            source = _channels_last(node.inputs[0])
            if source is not None:
                _replace(graph, node.outputs[0], source)
        elif node.op_type == "Shape" and _channels_last(node.inputs[0]) is not None:
            _look_up_elsewhere(graph, node)
        elif node.op_type in _FOLLOWERS and node.domain == "":
            _follow(graph, node)
    return count


def _convolve_channels_last(graph: ir.Graph, node: ir.Node) -> None:
    x, weight, *bias = node.inputs
    assert x is not None and weight is not None
    kernel = _constant(weight)
    assert kernel is not None  # The weight of a traced convolution is a parameter.
    name = f"{weight.name}.channels_last"
    if name not in graph.initializers:
        last = [kernel.shape[axis] for axis in TO_CHANNELS_LAST]
        # Transposed when it is written, so that memory holds one transposed weight at a time.
        tensor = ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(kernel.numpy().transpose(TO_CHANNELS_LAST))),
            dtype=kernel.dtype,
            shape=ir.Shape(last),
            name=name,
        )
        graph.register_initializer(ir.val(name, dtype=kernel.dtype, shape=ir.Shape(last), const_value=tensor))
    inputs = [_transposed(graph, x, node), graph.initializers[name], *bias]
    _emit_channels_last(graph, node, ir.node("NhwcConv", inputs, _attributes(node), domain=CONTRIB))


def _follow(graph: ir.Graph, node: ir.Node) -> None:
    """Move `node` to channels last if one of its inputs is there.

    Its other inputs get a Transpose, so that none is needed after `node`.
    """
    if not any(_channels_last(value) is not None for value in node.inputs):
        return
    movable = node.inputs[:1] if node.op_type in ("Resize", "Tile") else node.inputs
    inputs: list[ir.Value | None] = list(node.inputs)
    for i, value in enumerate(movable):
        assert value is not None  # Only Resize omits inputs.
        if len(_shape(value)) == 4:
            inputs[i] = _transposed(graph, value, node)
        elif value.shape is None or _shape(value) not in ([], [1]):
            return
    attributes = _attributes(node)
    if node.op_type == "Concat":
        if node.attributes["axis"].as_int() not in (1, -3):
            return
        attributes["axis"] = 3
    for i, value in enumerate(node.inputs[len(movable) :], len(movable)):
        if value is not None and _shape(value) == [4]:  # one entry for each axis: scales, sizes or repeats
            inputs[i] = _permuted(graph, value, node)
    _emit_channels_last(graph, node, ir.node(node.op_type, inputs, attributes, domain=node.domain))


def _permuted(graph: ir.Graph, value: ir.Value, before: ir.Node) -> ir.Value:
    order = ir.val(f"{value.name}.order", const_value=ir.tensor(np.array(TO_CHANNELS_LAST, np.int64)))
    if order.name not in graph.initializers:
        graph.register_initializer(order)
    node = ir.node("Gather", [value, graph.initializers[str(order.name)]], {"axis": 0})
    graph.insert_before(before, node)
    return node.outputs[0]


def _look_up_elsewhere(graph: ir.Graph, node: ir.Node) -> None:
    """Read the size of an axis from the value before its Transpose, so that the Transpose can vanish."""
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else None
    if end != start + 1 or node.inputs[0] is None:
        return
    axis = TO_CHANNELS_FIRST[start]
    moved = ir.node("Shape", [_channels_last(node.inputs[0])], {"start": axis, "end": axis + 1})
    graph.insert_before(node, moved)
    _replace(graph, node.outputs[0], moved.outputs[0])


def _emit_channels_last(graph: ir.Graph, node: ir.Node, moved: ir.Node) -> None:
    """Put `moved` and a Transpose back in the place of `node`. Its followers may make the Transpose unused."""
    (old,) = node.outputs
    back = ir.node("Transpose", [moved.outputs[0]], {"perm": list(TO_CHANNELS_FIRST)})
    graph.insert_before(node, [moved, back])
    _describe(moved.outputs[0], _permute(_shape(old)), old.dtype)
    _replace(graph, old, back.outputs[0])


def _transposed(graph: ir.Graph, value: ir.Value, before: ir.Node) -> ir.Value:
    source = _channels_last(value)
    if source is not None:
        return source
    node = ir.node("Transpose", [value], {"perm": list(TO_CHANNELS_LAST)})
    _describe(node.outputs[0], _permute(_shape(value)), value.dtype)
    graph.insert_before(before, node)
    return node.outputs[0]


def _channels_last(value: ir.Value | None) -> ir.Value | None:
    """If `value` is a Transpose of a value with channels last, return that value, else None."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and _perm(node) == TO_CHANNELS_FIRST else None


def _keep_heads_merged(graph: ir.Graph) -> int:
    count = 0
    for node in [node for node in graph if node.op_type == "MultiHeadAttention"]:
        for i, value in enumerate(node.inputs):
            merge = _producer(value, "Reshape")
            split = merge and _producer(merge.inputs[0], "Reshape")
            x = split and split.inputs[0]
            if split and x and _only_splits_heads(x, split.outputs[0]):
                node.replace_input_with(i, x)
                count += 1
        (split,) = node.outputs[0].consumers()
        for merge in list(split.outputs[0].consumers()):
            if merge.op_type == "Reshape" and _only_splits_heads(merge.outputs[0], split.outputs[0]):
                _replace(graph, merge.outputs[0], node.outputs[0])
                count += 1
    return count


def _only_splits_heads(merged: ir.Value, split: ir.Value) -> bool:
    """Return whether the shapes are (B, S, H*d) and (B, S, H, d)."""
    a, b = _shape(merged), _shape(split)
    if len(a) != 3 or len(b) != 4 or a[0] != b[0]:
        return False
    return all(isinstance(size, int) for size in (a[2], *b[2:])) and a[2] == b[2] * b[3]


def _fuse_silu(graph: ir.Graph) -> int:
    count = 0
    for norm in [node for node in graph if node.op_type == "GroupNorm"]:
        users = list(norm.outputs[0].consumers())
        if sorted(user.op_type for user in users) != ["Mul", "Sigmoid"]:
            continue
        sigmoid, product = sorted(users, key=lambda user: user.op_type, reverse=True)
        if sigmoid.outputs[0] in product.inputs:
            norm.attributes["activation"] = ir.AttrInt64("activation", 1)
            _replace(graph, product.outputs[0], norm.outputs[0])
            count += 1
    return count


def _fuse_skip(graph: ir.Graph) -> int:
    count = 0
    for norm in [node for node in graph if node.op_type == "GroupNorm"]:
        x, gamma, beta = norm.inputs
        add = _producer(x, "Add")
        if add is None:
            continue
        a, b = add.inputs
        if _shape(a)[1:3] == [1, 1]:  # the smaller one is the skip
            a, b = b, a
        if len(_shape(a)) != 4 or len(_shape(b)) != 4:
            continue
        fused = ir.node("SkipGroupNorm", [a, gamma, beta, b], _attributes(norm), domain=CONTRIB, num_outputs=2)
        for new, old in zip(fused.outputs, (norm.outputs[0], add.outputs[0]), strict=True):
            _describe(new, old.shape, old.dtype)
        graph.insert_before(add, fused)  # Both summands exist here, and no node has used the sum.
        _replace(graph, norm.outputs[0], fused.outputs[0])
        _replace(graph, add.outputs[0], fused.outputs[1])
        count += 1
    return count


def _fuse_split_gelu(graph: ir.Graph) -> int:
    count = 0
    for gelu in [node for node in graph if node.op_type == "Gelu"]:
        split = _producer(gelu.inputs[0], "Split")
        add = split and _producer(split.inputs[0], "Add")
        users = list(gelu.outputs[0].consumers())
        if not split or not add or len(split.outputs) != 2 or len(users) != 1 or users[0].op_type != "Mul":
            continue
        (product,) = users
        x, bias = _with_bias(add)
        # The operator puts the second half through Gelu, so the order must be x, gate.
        ordered = gelu.inputs[0] is split.outputs[1] and split.outputs[0] in product.inputs
        if ordered and bias is not None and _shape(bias)[0] in _SPLIT_GELU_WIDTHS:
            fused = ir.node("BiasSplitGelu", [x, bias], domain=CONTRIB)
            _put(graph, product, fused)
            count += 1
    return count


def _fuse_bias_add(graph: ir.Graph) -> int:
    count = 0
    for add in [node for node in graph if node.op_type == "Add"]:
        followers = {user.op_type for user in add.outputs[0].consumers()}
        if "LayerNormalization" in followers:
            continue
        for inner, skip in (add.inputs, list(reversed(add.inputs))):
            bias_add = _producer(inner, "Add")
            x, bias = _with_bias(bias_add) if bias_add else (None, None)
            if bias is None or inner is None or len(inner.consumers()) != 1 or len(_shape(skip)) != 3:
                continue
            if _producer(x, "MatMul") and _shape(bias)[0] in _BIAS_ADD_WIDTHS:
                _put(graph, add, ir.node("BiasAdd", [x, bias, skip], domain=CONTRIB))
                count += 1
                break
    return count


def _with_bias(add: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the summands (B, S, C) and bias (C), or (None, None) unless the bias is a constant."""
    for x, bias in (add.inputs, list(reversed(add.inputs))):
        if bias is not None and _constant(bias) is not None and len(_shape(bias)) == 1 and len(_shape(x)) == 3:
            return x, bias
    return None, None


def _put(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`. Each has one output."""
    _describe(new.outputs[0], old.outputs[0].shape, old.outputs[0].dtype)
    graph.insert_before(old, new)
    _replace(graph, old.outputs[0], new.outputs[0])


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Use `new` for `old`. An output of the graph keeps its name."""
    if new.shape is None:
        _describe(new, old.shape, old.dtype)
    if old in graph.outputs and (new in graph.outputs or new.is_graph_input() or new.is_initializer()):
        return  # An output needs a value of its own.
    if old in graph.outputs:
        new.name, old.name = old.name, None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if node.op_type == "Transpose" else ()


def _constant(value: ir.Value) -> Any:
    return ir.convenience.get_const_tensor(value)


def _shape(value: ir.Value | None) -> Sequence[Any]:
    """Return sizes, with equal symbols for equal sizes that vary; nothing where the shape is unknown."""
    return [] if value is None or value.shape is None else list(value.shape)


def _permute(shape: Sequence[Any]) -> ir.Shape:
    return ir.Shape([shape[axis] for axis in TO_CHANNELS_LAST])


def _describe(value: ir.Value, shape: ir.Shape | None, dtype: ir.DataType | None) -> None:
    value.shape = shape
    if dtype is not None:
        value.dtype = dtype


def _attributes(node: ir.Node) -> dict[str, Any]:
    return dict(node.attributes)
