"""Damaged ONNX graphs: their messages changed one by one, and graphs inserted that take time, memory or files."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Error
from hypothesis import strategies as st
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from onnx.checker import ValidationError

from fuzz.cases import TEXTS, Draw, edit_bytes

MANY = st.sampled_from([0, 1, 2, 3, 4, 7, 100, 2**16, 2**20, 2**31 - 1, 2**31, 2**33, 2**40, 2**62, 2**63 - 1, -1, -2])
TYPES = st.one_of(
    st.sampled_from(
        [
            TensorProto.FLOAT,
            TensorProto.DOUBLE,
            TensorProto.FLOAT16,
            TensorProto.BFLOAT16,
            TensorProto.INT64,
            TensorProto.INT32,
            TensorProto.UINT8,
            TensorProto.BOOL,
            TensorProto.STRING,
            TensorProto.COMPLEX64,
            TensorProto.FLOAT8E4M3FN,
            TensorProto.INT4,
            TensorProto.UNDEFINED,
        ]
    ),
    st.integers(-1, 99),
)
OPERATORS = st.sampled_from(
    """Identity Neg Abs Not Cast Shape Size NonZero Unique Range ConstantOfShape Expand Tile Transpose Squeeze Unsqueeze
    Flatten Concat Split Slice Gather GatherND ScatterND Reshape Pad Resize Upsample MatMul Gemm Conv ConvTranspose
    Add Sub Mul Div Mod Pow BitShift Where TopK OneHot CumSum Einsum Loop If Scan Optional OptionalGetElement
    SequenceEmpty SequenceAt ConcatFromSequence SplitToSequence StringNormalizer TfIdfVectorizer RandomNormal
    RandomUniformLike Bernoulli Multinomial ReduceSum ReduceMean LSTM GRU RNN NonMaxSuppression ImageDecoder DFT STFT
    QuantizeLinear DequantizeLinear DynamicQuantizeLinear LayerNormalization GroupNormalization Softmax Tanh NoSuchOp
    EPContext MultiHeadAttention""".split()  # noqa: SIM905 (for reading)
)
SHAPES = st.lists(st.one_of(MANY, st.sampled_from(["B", "h", "w", "k", "x" * 300, ""])), max_size=6)


def damaged(draw: Draw, data: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Change a graph in one to three places."""
    edits: list[str] = []
    if draw(st.integers(0, 30)) == 30:
        depth = draw(st.sampled_from([10, 33, 34, 100, 10_000]))
        return data + _nested_bytes(depth), (f"{depth} graphs in one another",)
    if draw(st.integers(0, 4)) == 4:
        for _ in range(draw(st.integers(1, 4))):
            data, said = edit_bytes(draw, data)
            edits.append(said)
        return data, tuple(edits)
    model = onnx.load_from_string(data)
    for _ in range(draw(st.integers(1, 3))):
        change = draw(st.sampled_from(CHANGES))
        try:
            said = change(draw, model)
        except (TypeError, ValueError, AttributeError, IndexError, Error, ValidationError) as error:  # impossible
            said = f"no {type(error).__name__}"
        edits.append(f"{change.__name__.strip('_')}: {said}")
    return model.SerializeToString(), tuple(edits)


def _nested_bytes(depth: int) -> bytes:
    """Return the bytes of a graph in an attribute of a node in a graph and so on, which no library would write."""
    inner = b""
    for _ in range(depth):
        for field in (6, 5, 1):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            inner = bytes([field << 3 | 2]) + _varint(len(inner)) + inner
    return bytes([7 << 3 | 2]) + _varint(len(inner)) + inner  # ModelProto.graph


def _varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])


def with_external(data: bytes, location: str, more: tuple[tuple[str, str], ...] = ()) -> tuple[bytes, bytes]:
    """Move the weights of a graph to another file. Returns the graph, and that file."""
    model = onnx.load_from_string(data)
    stored = b""
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name == "scales":
            continue  # ONNX Runtime reads shapes from the graph itself only
        raw = numpy_helper.to_array(tensor).tobytes()
        stored += bytes(-len(stored) % 64)
        dims, kind, name = list(tensor.dims), tensor.data_type, tensor.name
        tensor.Clear()
        tensor.dims.extend(dims)
        tensor.data_type, tensor.name, tensor.raw_data = kind, name, raw
        external_data_helper.set_external_data(tensor, location, offset=len(stored), length=len(raw))
        for key, value in more:
            for entry in [entry for entry in tensor.external_data if entry.key == key]:
                tensor.external_data.remove(entry)
            tensor.external_data.add(key=key, value=value)
        tensor.ClearField("raw_data")
        stored += raw
    return model.SerializeToString(), stored


def _interface(draw: Draw, model: Any) -> Any:
    return draw(st.sampled_from([*model.graph.input, *model.graph.output]))


def _type(draw: Draw, model: Any) -> str:
    """Declare another type of an input or output."""
    item, kind = _interface(draw, model), draw(TYPES)
    shape = [d.dim_value or d.dim_param for d in item.type.tensor_type.shape.dim]
    how = draw(st.sampled_from(["tensor", "tensor", "tensor", "sequence", "optional", "sparse", "none"]))
    if how == "tensor":
        item.type.tensor_type.elem_type = kind
    else:
        inner = helper.make_tensor_type_proto(kind, shape)
        item.type.Clear()
        if how == "sequence":
            item.type.CopyFrom(helper.make_sequence_type_proto(inner))
        elif how == "optional":
            item.type.CopyFrom(helper.make_optional_type_proto(inner))
        elif how == "sparse":
            item.type.sparse_tensor_type.elem_type = kind
    return f"{item.name} {how} {kind}"


def _rank(draw: Draw, model: Any) -> str:
    """Declare another shape of an input or output."""
    item, shape = _interface(draw, model), draw(st.one_of(st.none(), SHAPES))
    kind = item.type.tensor_type.elem_type
    item.type.CopyFrom(helper.make_tensor_type_proto(kind, shape))
    return f"{item.name} {str(shape)[:60]}"


def _cast(draw: Draw, model: Any) -> str:
    """Compute an output in another type, and declare it so."""
    item, kind = draw(st.sampled_from(list(model.graph.output))), draw(TYPES)
    _before_output(model, item.name, lambda given, made: [helper.make_node("Cast", [given], [made], to=kind)])
    if draw(st.booleans()):
        item.type.tensor_type.elem_type = kind
    return f"{item.name} {kind}"


def _name(draw: Draw, model: Any) -> str:
    """Give another name to one thing, or in one place."""
    names = [(item, None) for item in (*model.graph.input, *model.graph.output, *model.graph.initializer)]
    names += [(node.input, i) for node in model.graph.node for i in range(len(node.input))]
    names += [(node.output, i) for node in model.graph.node for i in range(len(node.output))]
    item, place = draw(st.sampled_from(names))
    others = [value.name for value in (*model.graph.input, *model.graph.output, *model.graph.initializer)]
    new = draw(st.one_of(st.sampled_from(others), TEXTS))
    old = item.name if place is None else item[place]
    if place is None:
        item.name = new
    else:
        item[place] = new
    return f"{old} => {new[:30]!r}"


def _interface_lists(draw: Draw, model: Any) -> str:
    """Drop or repeat an input, an output, a node or a constant, or change their order."""
    which = draw(st.sampled_from(["input", "output", "node", "initializer"]))
    items = getattr(model.graph, which)
    kind = draw(st.sampled_from(["drop", "repeat", "reverse", "move", "add"]))
    copies = list(items)
    at = draw(st.integers(0, len(copies) - 1)) if copies else 0
    if kind == "drop" and copies:
        del items[at]
    elif kind == "repeat" and copies:
        items.append(copies[at])
    elif kind == "reverse":
        order = [type(item).FromString(item.SerializeToString()) for item in reversed(copies)]
        del items[:]
        items.extend(order)
    elif kind == "move" and copies and which in ("input", "output"):
        other = model.graph.output if which == "input" else model.graph.input
        other.append(copies[at])
    elif kind == "add":
        name = draw(st.sampled_from(["extra", "text", "latents", "image", "step_index"]))
        model.graph.input.append(helper.make_tensor_value_info(name, draw(TYPES), draw(SHAPES)))
    return f"{kind} {which} {at}"


def _operator(draw: Draw, model: Any) -> str:
    """Make another operator of a node."""
    node = draw(st.sampled_from(list(model.graph.node)))
    node.op_type = draw(st.one_of(OPERATORS, TEXTS))
    if draw(st.booleans()):
        node.domain = draw(st.sampled_from(["", "com.microsoft", "ai.onnx.ml", "evil", "x" * 5000]))
    return f"{node.domain[:20]}.{node.op_type[:20]}"


def _attribute(draw: Draw, model: Any) -> str:
    """Give a node an attribute, or change one."""
    node = draw(st.sampled_from(list(model.graph.node)))
    names = [attribute.name for attribute in node.attribute]
    name = draw(st.sampled_from([*names, "axis", "to", "keepdims", "value", "body", "mode", "perm", "\0"]))
    value = draw(
        st.one_of(
            MANY,
            st.floats(),
            TEXTS,
            st.lists(MANY, min_size=1, max_size=5),
            st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=3),
            st.sampled_from([_nothing_graph(), numpy_helper.from_array(np.zeros(3))]),
        )
    )
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.append(helper.make_attribute(name, value))
    if draw(st.integers(0, 5)) == 0:
        node.attribute[-1].type = draw(st.integers(0, 15))
    return f"{node.op_type} {name!r} {str(value)[:40]!r}"


def _constant(draw: Draw, model: Any) -> str:
    """Change a constant: type, shape, bytes, and where they are."""
    if not model.graph.initializer:
        return "none"
    tensor = draw(st.sampled_from(list(model.graph.initializer)))
    kind = draw(st.sampled_from(["type", "shape", "bytes", "cut", "text", "huge", "values", "external", "both"]))
    if kind == "type":
        tensor.data_type = draw(TYPES)
    elif kind == "shape":
        del tensor.dims[:]
        tensor.dims.extend(draw(st.lists(MANY, max_size=5)))
    elif kind == "bytes":
        tensor.raw_data, _ = edit_bytes(draw, tensor.raw_data)
    elif kind == "cut":
        tensor.raw_data = tensor.raw_data[:-1]
    elif kind == "text":
        many = draw(st.sampled_from([1, 3, 1000]))
        tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.STRING, [many], [b"x" * 10] * many))
    elif kind == "huge":
        tensor.CopyFrom(
            numpy_helper.from_array(np.zeros(draw(st.sampled_from([10**5, 10**6])), np.float32), tensor.name)
        )
    elif kind == "values":
        array = np.array(numpy_helper.to_array(tensor))
        extreme = draw(st.sampled_from([np.nan, np.inf, -1, 0, 3e38, 1e-45, 10**6, 2**62]))
        with np.errstate(all="ignore"):
            array[...] = np.array(extreme, dtype=np.float64).astype(array.dtype)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    elif kind == "external":
        tensor.data_location = draw(st.sampled_from([0, 1, 7]))
        for _ in range(draw(st.integers(0, 2))):
            key = draw(st.sampled_from(["location", "offset", "length", "checksum", "", "LOCATION"]))
            tensor.external_data.add(key=key, value=draw(TEXTS))
    else:
        tensor.float_data.extend([0.5] * draw(st.sampled_from([1, 1000])))
    return f"{tensor.name} {kind}"


def _version(draw: Draw, model: Any) -> str:
    """Change the versions that the file declares."""
    if draw(st.booleans()):
        model.ir_version = draw(st.sampled_from([0, 1, 3, 7, 12, 99, 2**40, -1]))
    else:
        del model.opset_import[:]
        for _ in range(draw(st.integers(0, 2))):
            version = draw(st.sampled_from([-1, 0, 1, 6, 9, 11, 13, 17, 21, 23, 26, 99, 2**40]))
            model.opset_import.append(helper.make_opsetid(draw(st.sampled_from(["", "ai.onnx.ml", "evil"])), version))
    return f"{model.ir_version} {[o.version for o in model.opset_import]}"


def _inserted(draw: Draw, model: Any) -> str:
    """Put something between an output and the node that computes it."""
    item = draw(st.sampled_from(list(model.graph.output)))
    name = draw(st.sampled_from(sorted(INSERTED)))
    number = draw(MANY)
    _before_output(model, item.name, lambda given, made: INSERTED[name](model, given, made, number))
    return f"{item.name} {name} {number}"


def _before_output(model: Any, name: str, between: Callable[[str, str], list[Any]]) -> None:
    inner = f"{name}.before{len(model.graph.node)}"
    for node in model.graph.node:
        for names in (node.output, node.input):
            for i, used in enumerate(names):
                if used == name:
                    names[i] = inner
    model.graph.node.extend(between(inner, name))


def _const(model: Any, name: str, value: Any) -> str:
    name = f"{name}.{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def _nothing_graph() -> Any:
    value = helper.make_tensor_value_info("nothing", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node("Identity", ["x"], ["nothing"])], "nothing", [], [value])


def _loop(model: Any, given: str, made: str, number: int) -> list[Any]:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["before"], ["after"])],
        "body",
        [
            value("round", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("before", TensorProto.FLOAT, None),
        ],
        [value("on", TensorProto.BOOL, []), value("after", TensorProto.FLOAT, None)],
    )
    rounds = _const(model, f"{made}.rounds", np.int64(number))
    return [helper.make_node("Loop", [rounds, "", given], [made], body=body)]


def _growing(model: Any, given: str, made: str, number: int) -> list[Any]:
    """A loop that doubles its value along the last axis each time."""
    nodes = _loop(model, given, made, number)
    body = nodes[0].attribute[0].g
    body.node[1].CopyFrom(helper.make_node("Concat", ["before", "before"], ["after"], axis=-1))
    return nodes


def _nested(model: Any, given: str, made: str, number: int) -> list[Any]:
    """Branches in branches."""
    yes = _const(model, f"{made}.yes", np.array(True))
    result = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Identity", [given], ["branch"])], "leaf", [], [result])
    for depth in range(min(abs(number), 24)):
        node = helper.make_node("If", [yes], ["branch"], then_branch=graph, else_branch=_leaf(given))
        graph = helper.make_graph([node], f"depth{depth}", [], [result])
    return [helper.make_node("If", [yes], [made], then_branch=graph, else_branch=_leaf(given))]


def _leaf(given: str) -> Any:
    result = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node("Identity", [given], ["branch"])], "leaf", [], [result])


def _recursive(model: Any, given: str, made: str, number: int) -> list[Any]:
    """A function that calls itself."""
    call = helper.make_node("Again", ["x"], ["y"], domain="own")
    function = helper.make_function("own", "Again", ["x"], ["y"], [call], [helper.make_opsetid("own", 1)])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    return [helper.make_node("Again", [given], [made], domain="own")]


def _shaped_like(operator: str) -> Callable[[Any, str, str, int], list[Any]]:
    """Add something enormous that is made from a small constant."""

    def insert(model: Any, given: str, made: str, number: int) -> list[Any]:
        size = _const(model, f"{made}.size", np.array([number]))
        one = _const(model, f"{made}.one", np.float32([1]))
        if operator == "Range":
            ends = [_const(model, f"{made}.{i}", np.float32(v)) for i, v in enumerate((0, number, 1))]
            first = helper.make_node("Range", ends, [f"{made}.large"])
        elif operator == "ConstantOfShape":
            first = helper.make_node(operator, [size], [f"{made}.large"])
        else:
            first = helper.make_node(operator, [one, size], [f"{made}.large"])
        mean = helper.make_node("ReduceMean", [f"{made}.large"], [f"{made}.mean"], keepdims=0)
        return [first, mean, helper.make_node("Add", [given, f"{made}.mean"], [made])]

    return insert


def _simple(operator: str, *constants: Any, **attributes: Any) -> Callable[[Any, str, str, int], list[Any]]:
    def insert(model: Any, given: str, made: str, number: int) -> list[Any]:
        values = [number if constant == "number" else constant for constant in constants]
        names = [_const(model, f"{made}.{i}", value) for i, value in enumerate(values)]
        return [helper.make_node(operator, [given, *names], [made], **attributes)]

    return insert


INSERTED: dict[str, Callable[[Any, str, str, int], list[Any]]] = {
    "loop": _loop,
    "growing": _growing,
    "nested": _nested,
    "recursive": _recursive,
    **{name: _shaped_like(name) for name in ("Range", "ConstantOfShape", "Expand", "Tile")},
    "nan": _simple("Mul", np.float32("nan")),
    "infinity": _simple("Add", np.float32("inf")),
    "zero": _simple("Mul", np.float32(0)),
    "unsqueeze": _simple("Unsqueeze", np.array([0])),
    "scalar": _simple("ReduceMean", keepdims=0),
    "flat": _simple("Reshape", np.array([-1])),
    "empty": _simple("Slice", np.array([0]), np.array([0])),
    "shorter": _simple("Slice", np.array([0]), np.array([-1]), np.array([-1])),
    "twice": _simple("Tile", np.array([2, 1, 1, 1])),
    "transposed": _simple("Transpose"),
    "shape": _simple("Shape"),
    "text": _simple("Cast", to=TensorProto.STRING),
    "compiled": _simple("EPContext", domain="com.microsoft"),
    "resized": _simple("Resize", np.float32([]), np.float32([1, 1, 1e9, 1e9])),
    "tiled": lambda model, given, made, number: [
        helper.make_node("Tile", [given, _const(model, f"{made}.times", np.array([1, 1, 1, number]))], [made])
    ],
    "random": _simple("RandomNormalLike"),
}


def _texts(draw: Draw, model: Any) -> str:
    """Change texts that nobody reads."""
    where, text = draw(st.sampled_from(["doc", "producer", "metadata", "node", "graph"])), draw(TEXTS)
    if where == "doc":
        model.doc_string = text
    elif where == "producer":
        model.producer_name = text
    elif where == "metadata":
        model.metadata_props.add(key=text, value=text)
    elif where == "node":
        model.graph.node[0].name = text
    else:
        model.graph.name = text
    return f"{where} {text[:20]!r}"


CHANGES = (
    _type,
    _rank,
    _cast,
    _name,
    _interface_lists,
    _operator,
    _attribute,
    _constant,
    _version,
    _inserted,
    _inserted,
    _texts,
)
