"""The target for browsers, and weights that are stored in 8 bits."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
from test_export import SCHEDULES, assert_refused, export
from tiue_runtime import Pipeline, bundle
from tolerances import EIGHT_BITS

from export import assemble as assembling
from export import writer as files
from export.export_options import Options
from export.storage import store_int8
from tiue.checkpoint import Student, save_student

LIMIT = 40_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    save_student(path, Student(tiny.sd15(), 751, SCHEDULES, "tiny-teacher"))
    return path


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(assembling, "WEB_FILE_LIMIT", LIMIT)
    monkeypatch.setattr(files, "_PAGE", 4096)


@pytest.mark.usefixtures("traced_once", "small_files")
@pytest.mark.slow  # a whole export
def test_a_bundle_for_browsers_in_8_bits(checkpoint, tmp_path, capsys):
    """It has small files and ONNX Runtime's own attention, passed the gate, and runs on a CPU as well."""
    arguments = ("--target", "web", "--weights", "int8", "--steps", "4")
    assert export("--ckpt", checkpoint, "--out", tmp_path / "web", *arguments) == 0
    assert "35.0 dB in reduced precision" in capsys.readouterr().out
    made = bundle.Bundle.load(tmp_path / "web")
    assert list(made.manifest.variants) == [bundle.WEB]
    assert (made.manifest.precision, made.manifest.weights) == ("fp32", "int8")
    decoder = ir.load(made.graph_path(bundle.UNET_DECODER, bundle.WEB))
    assert "MultiHeadAttention" in {node.op_type for node in decoder.graph}

    data = {name: info.size for name, info in made.manifest.files.items() if name.startswith("unet_decoder.web.onnx.")}
    assert {"unet_decoder.web.onnx.data", "unet_decoder.web.onnx.2.data"} <= data.keys()
    tensors = [value.const_value for value in decoder.graph.initializers.values()]
    outside = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    assert {tensor.location for tensor in outside} == data.keys()
    assert {ir.DataType.INT8, ir.DataType.FLOAT16} <= {tensor.dtype for tensor in outside}
    for name, size in data.items():
        assert size <= LIMIT or sum(tensor.location == name for tensor in outside) == 1
    with Pipeline.load(tmp_path / "web", device="cpu") as pipeline:
        assert pipeline.variant == bundle.WEB
        assert len(pipeline("a cat").images) == 1


def test_files_for_browsers_alone_hold_float16():
    assert Options(target=("web",)).stored == "fp16"
    assert Options(target=("portable", "web")).stored == Options().stored == "fp32"
    assert Options(target=("web",), weights="fp32").stored == "fp32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "web", "--precision", "fp16"), "the web target computes in fp32"),
        (("--target", "portable,web", "--precision", "int8"), "WebGPU has no such kernels"),
        (("--precision", "fp16", "--weights", "int8"), "--weights int8"),
        (("--precision", "int8", "--weights", "int8"), "--weights int8"),
    ],
)
def test_what_contradicts_itself_is_refused(checkpoint, tmp_path, capsys, arguments, message):
    status = export("--ckpt", checkpoint, "--out", tmp_path / "out", *arguments)
    assert_refused(capsys, status, message, tmp_path, [])


# Storing in 8 bits.


def convolution(weight):
    x = ir.val("x", ir.DataType.FLOAT, [1, weight.shape[1], 8, 8])
    stored = ir.val("weight", const_value=ir.tensor(weight))
    node = ir.node("Conv", [x, stored])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", x.dtype, ir.Shape([1, len(weight), 6, 6])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[stored], opset_imports={"": 18})
    return ir.Model(graph, ir_version=10)


def run(model, x):
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def weight_of(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_kernels_are_stored_in_8_bits():
    weight, x = weight_of(4, 32, 3, 3), weight_of(1, 32, 8, 8)
    weight[0] = 0  # Blocks without a scale of their own.
    weight[1] /= 1e6
    expected = run(convolution(weight), x)
    model = convolution(weight)
    assert store_int8(model) == 1
    kinds = {value.dtype for value in model.graph.initializers.values()}
    assert ir.DataType.INT8 in kinds and ir.DataType.FLOAT not in kinds
    made = run(model, x)
    assert not made[:, 0].any()
    np.testing.assert_allclose(made, expected, atol=EIGHT_BITS * expected.std(), rtol=0)


@pytest.mark.parametrize(
    "weight",
    [weight_of(4, 5, 3, 3), weight_of(4, 32, 3, 3) * 1e-5, weight_of(4, 32, 3, 3) * 1e8],
    ids=["rows of 45", "all small", "too large"],
)
def test_weights_that_do_not_fit_8_bits_stay(weight):
    model = convolution(weight)
    assert store_int8(model) == 0
    (kept,) = model.graph.initializers.values()
    assert np.array_equal(kept.const_value.numpy(), weight)
