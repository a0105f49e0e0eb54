"""The models that the runtime proves a device with are bytes there; here they are built again from their meaning."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from tiue_runtime.ort.placement import PROBE_MODEL, PRODUCT_MODEL


def model(operator: str, inputs: list[str], shape: list[int]) -> onnx.ModelProto:
    """y = operator(inputs), all of them floats of one shape."""
    tensors = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (*inputs, "y")}
    node = helper.make_node(operator, inputs, ["y"])
    graph = helper.make_graph([node], "probe", [tensors[name] for name in inputs], [tensors["y"]])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def run(data: bytes, **feed: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feed)[0]


def test_the_probe_is_identity_on_one_float():
    rebuilt = model("Identity", ["x"], [1])
    assert rebuilt.SerializeToString(deterministic=True) == PROBE_MODEL
    onnx.checker.check_model(rebuilt, full_check=True)
    assert run(PROBE_MODEL, x=np.float32([3])) == [3]


def test_the_product_shows_rounding():
    rebuilt = model("MatMul", ["a", "b"], [16, 16])
    assert rebuilt.SerializeToString(deterministic=True) == PRODUCT_MODEL
    onnx.checker.check_model(rebuilt, full_check=True)
    a, b = np.full((16, 16), 1 + 2**-10, dtype=np.float32), np.eye(16, dtype=np.float32)
    np.testing.assert_array_equal(run(PRODUCT_MODEL, a=a, b=b), a)  # exact in float32; in bf16 it would be 1
