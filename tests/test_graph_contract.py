"""Graphs that break the contract are refused when they are loaded, and a wrong result when it is computed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiue_runtime import Pipeline
from tiue_runtime.bundle import Bundle, write_bundle
from tiue_runtime.errors import BundleError

TINY = Path(__file__).parents[1] / "runtime/tests/data/tiny"
PROMPT = "a red heart"


@pytest.fixture
def altered(tmp_path):
    """altered(graph, change) is the tiny bundle with change(GraphProto) made to one graph."""

    def make(name: str, change) -> Path:
        for file in TINY.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        model = onnx.load(TINY / f"{name}.onnx")
        change(model.graph)
        onnx.save(model, tmp_path / f"{name}.onnx")
        write_bundle(tmp_path, replace(Bundle.load(TINY).manifest, name="altered"))
        return tmp_path

    return make


def last(graph, name, node) -> None:
    """Compute the output `name` by one more node, from its former value, which is called "before"."""
    for producer in graph.node:
        producer.output[:] = ["before" if output == name else output for output in producer.output]
    graph.node.append(node)


def cast(name: str, to: int):
    """A change: the output `name` has another type."""

    def change(graph) -> None:
        last(graph, name, helper.make_node("Cast", ["before"], [name], to=to))
        next(output for output in graph.output if output.name == name).type.tensor_type.elem_type = to

    return change


def reshaped(name: str, shape: list[int]):
    """A change: the output `name` has another shape, and says so."""

    def change(graph) -> None:
        graph.initializer.append(numpy_helper.from_array(np.array(shape, dtype=np.int64), "new_shape"))
        last(graph, name, helper.make_node("Reshape", ["before", "new_shape"], [name]))
        output = next(output for output in graph.output if output.name == name)
        del output.type.tensor_type.shape.dim[:]
        for size in shape:
            output.type.tensor_type.shape.dim.add().dim_value = size

    return change


def averaged(name: str):
    """A change: the output `name` is one number, without dimensions."""

    def change(graph) -> None:
        last(graph, name, helper.make_node("ReduceMean", ["before"], [name], keepdims=0))
        output = next(output for output in graph.output if output.name == name)
        output.type.tensor_type.ClearField("shape")
        output.type.tensor_type.shape.SetInParent()

    return change


WRONG = {
    "double text": ("text_encoder", cast("text", TensorProto.DOUBLE), "text"),
    "text of strings": ("text_encoder", cast("text", TensorProto.STRING), "text"),
    "text without dimensions": ("text_encoder", averaged("text"), "text"),
    "feature of strings": ("unet_encoder", cast("mid", TensorProto.STRING), "mid"),
    "another type of feature": ("unet_encoder", cast("mid", TensorProto.DOUBLE), "mid"),
    "another rank of feature": ("unet_encoder", averaged("skip.0"), "skip.0"),
    "integers as contribution": ("unet_decoder", cast("contribution", TensorProto.INT64), "contribution"),
    "contribution without dimensions": ("unet_decoder", averaged("contribution"), "contribution"),
    "half-precision image": ("vae_decoder", cast("image", TensorProto.FLOAT16), "image"),
    "flat image": ("vae_decoder", reshaped("image", [-1]), "image"),
}


@pytest.mark.parametrize("memory", ["auto", "low"])
@pytest.mark.parametrize(("graph", "change", "named"), WRONG.values(), ids=WRONG.keys())
def test_types_and_ranks_are_checked_when_a_graph_is_loaded(altered, graph, change, named, memory):
    bundle = altered(graph, change)
    if memory == "auto":
        with pytest.raises(BundleError, match=named):
            Pipeline.load(bundle, device="cpu")
        return
    pipe = Pipeline.load(bundle, device="cpu", memory="low")
    for _ in range(2):  # A refused graph is not kept for the next request.
        with pytest.raises(BundleError, match=named):
            pipe(PROMPT)


def identity(name: str, kind: int, shape: list[str]):
    """A change: one more input, which one more output repeats."""

    def change(graph) -> None:
        graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        graph.output.append(helper.make_tensor_value_info(f"{name} again", kind, shape))
        graph.node.append(helper.make_node("Identity", [name], [f"{name} again"]))

    return change


@pytest.mark.parametrize(
    ("graph", "name", "kind", "shape"),
    [
        ("vae_decoder", "mask", TensorProto.FLOAT, ["B"]),  # no input of the contract
        ("unet_decoder", "text", TensorProto.DOUBLE, ["B", "L", "D"]),
        ("unet_decoder", "text", TensorProto.FLOAT, ["B", "L"]),
        ("unet_decoder", "latents", TensorProto.STRING, ["B", "C", "h", "w"]),
    ],
)
def test_inputs_are_checked_when_a_graph_is_loaded(altered, graph, name, kind, shape):
    with pytest.raises(BundleError, match=f"{graph}: expected .*{name}"):
        Pipeline.load(altered(graph, identity(name, kind, shape)), device="cpu")


def called(old: str, new: str):
    """A change: a feature has another name."""

    def change(graph) -> None:
        for value in (*graph.input, *graph.output):
            value.name = new if value.name == old else value.name
        for node in graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]

    return change


def test_a_feature_cannot_take_a_name_of_the_contract(altered):
    with pytest.raises(BundleError, match="unet_encoder: expected step_weight"):
        Pipeline.load(altered("unet_encoder", called("mid", "step_weight")), device="cpu")


COMPUTED = {
    "text": ("text_encoder", "text"),
    "feature": ("unet_encoder", "mid"),
    "contribution": ("unet_decoder", "contribution"),
    "image": ("vae_decoder", "image"),
}


def hidden(name: str, shape: tuple[int, ...]):
    """A change: the output has a shape that is known only when it is computed, and the old one is declared."""

    def change(graph) -> None:
        declared = onnx.ValueInfoProto()
        output = next(output for output in graph.output if output.name == name)
        declared.CopyFrom(output)
        # The number of dimensions follows from the values, so ONNX Runtime cannot infer it.
        constants = {"wanted": [*shape, 1], "begin": [0], "rank": [len(shape)]}
        graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), n) for n, v in constants.items())
        nodes = [
            helper.make_node("ReduceMax", ["before"], ["most"], keepdims=0),
            helper.make_node("IsNaN", ["most"], ["nan"]),
            helper.make_node("Cast", ["nan"], ["zero"], to=TensorProto.INT64),
            helper.make_node("Add", ["rank", "zero"], ["end"]),
            helper.make_node("Slice", ["wanted", "begin", "end"], ["new_shape"]),
            helper.make_node("Expand", ["most", "new_shape"], [name]),
        ]
        last(graph, name, nodes[0])
        graph.node.extend(nodes[1:])
        output.CopyFrom(declared)

    return change


@pytest.mark.parametrize("memory", ["parallel", "low"])
@pytest.mark.parametrize("shape", [(), (7,), (1, 2, 3, 4, 5)], ids=["scalar", "flat", "deep"])
@pytest.mark.parametrize(("graph", "name"), COMPUTED.values(), ids=COMPUTED.keys())
def test_shapes_are_checked_when_they_are_computed(altered, graph, name, shape, memory):
    pipe = Pipeline.load(altered(graph, hidden(name, shape)), device="cpu", memory=memory)
    with pytest.raises(BundleError, match=f"{graph}: expected {name}"):
        pipe(PROMPT)
