from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper
from test_export import SCHEDULES
from tiue_runtime import Pipeline, bundle
from tolerances import INT8_CEILING_DB, INT8_REORDERED, REORDERED
from tracing import traced_once

from export.errors import ExportError
from export.export_options import INT8_FLOOR_DB, Options
from export.int8 import calibrate, quantizable, quantize, signal_db
from export.onnx import main
from tiue.checkpoint import Student, save_student

RNG = np.random.default_rng(0)
RUNS = [{"x": RNG.standard_normal((b, 8, 6, 5)).astype(np.float32)} for b in (1, 2)]


def graph():
    """conv, conv (an output, too), conv, a matrix product of channels, matrix product: three between the ends."""

    def weight(name, *shape):
        return numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32), name)

    def conv(x, i, y):
        return helper.make_node("Conv", [x, f"w{i}", f"b{i}"], [y], kernel_shape=[3, 3], pads=[1] * 4)

    nodes = [
        conv("x", 0, "a"),
        conv("a", 1, "b"),
        conv("b", 2, "c"),
        helper.make_node("Transpose", ["c"], ["d"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["d", "m0"], ["e"]),
        helper.make_node("MatMul", ["e", "m1"], ["y"]),
    ]
    shapes = {"x": ["n", 8, 6, 5], "y": ["n", 6, 5, 4], "b": ["n", 8, 6, 5]}
    x, y, b = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    weights = [weight(f"w{i}", 8, 8, 3, 3) for i in range(3)] + [weight(f"b{i}", 8) for i in range(3)]
    weights += [weight("m0", 8, 16), weight("m1", 16, 4)]
    proto = helper.make_graph(nodes, "g", [x], [y, b], weights)
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def session(model, optimized=None):
    options = ort.SessionOptions()
    if optimized:
        options.optimized_model_filepath = str(optimized)
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def psnr(made, expected):
    return 10 * np.log10(np.ptp(expected) ** 2 / np.mean((made - expected) ** 2))


def test_ranges_are_those_of_all_runs_and_the_graph_stays_as_it_was():
    model = graph()
    before = ir.to_proto(model).SerializeToString()
    ranges, made = calibrate(model, RUNS)
    assert ir.to_proto(model).SerializeToString() == before
    assert ranges.keys() == {"a", "b", "c", "d"}  # the last product's output is not rounded, and its input is not its
    expected = [session(model).run(["b"], run)[0] for run in RUNS]
    assert ranges["b"].low == min(b.min() for b in expected)
    assert ranges["b"].high == max(b.max() for b in expected)
    assert ranges["b"].mean_square == pytest.approx(np.mean([np.mean(b**2) for b in expected]), rel=REORDERED)
    assert all(np.array_equal(run["b"], b) for run, b in zip(made, expected, strict=True))


def test_what_is_quantized_computes_in_8_bits_and_nothing_else_does(tmp_path):
    model = graph()
    ranges, made = calibrate(model, RUNS)
    layers = quantizable(model)
    assert quantize(model, ranges, floor_db=0) == len(layers) == 3
    run = session(model, tmp_path / "optimized.onnx")
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert (operators["QLinearConv"], operators["MatMulIntegerToFloat"]) == (2, 1)
    assert (operators["Conv"], operators["MatMul"]) == (1, 1)
    assert [output.name for output in run.get_outputs()] == ["y", "b"]
    for feeds, expected in zip(RUNS, made, strict=True):
        for name, value in zip(("y", "b"), run.run(["y", "b"], feeds), strict=True):
            assert INT8_FLOOR_DB < psnr(value, expected[name]) < INT8_CEILING_DB


def test_biases_are_kept_whatever_the_weights_of_their_channel(tmp_path):
    """Two layers share a bias, and have other steps. In one, a channel has almost no weights."""
    model = graph()
    second, third = quantizable(model)[:2]
    values = second.inputs[1].const_value.numpy().copy()
    values[3] *= 1e-12
    second.inputs[1].const_value = ir.tensor(values)
    second.inputs[2].const_value = ir.tensor(RNG.standard_normal(8).astype(np.float32) * 300)
    third.replace_input_with(2, second.inputs[2])
    ranges, made = calibrate(model, RUNS)
    assert quantize(model, ranges, floor_db=0) == 3
    run = session(model, tmp_path / "optimized.onnx")
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert operators["QLinearConv"] == 2
    for feeds, expected in zip(RUNS, made, strict=True):
        for name, value in zip(("y", "b"), run.run(["y", "b"], feeds), strict=True):
            assert psnr(value, expected[name]) > INT8_FLOOR_DB


def test_a_layer_that_would_lose_too_much_stays_in_float():
    model = graph()
    outlier = [{"x": RUNS[0]["x"].copy()}]
    ranges, _ = calibrate(model, outlier)
    worst = min(quantizable(model), key=lambda node: signal_db(node, ranges))
    floor = sorted(signal_db(node, ranges) for node in quantizable(model))[1]
    assert quantize(model, ranges, floor) == 2
    assert worst.inputs[1].is_initializer()
    assert quantize(graph(), ranges, floor_db=100) == 0


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The same student in float32 and in int8."""
    root = tmp_path_factory.mktemp("int8")
    save_student(root / "s.safetensors", Student(tiny.emoji(), 751, SCHEDULES))
    for precision in ("fp32", "int8"):
        flags = ["--ckpt", str(root / "s.safetensors"), "--out", str(root / precision), "--precision", precision]
        with traced_once():
            assert main(flags) == 0
    return root


def test_an_int8_bundle(bundles):
    manifest = bundle.Bundle.load(bundles / "int8").manifest
    assert (manifest.precision, manifest.weights) == ("int8", "int8")
    files = manifest.variants["portable"]
    operators = {name: {n.op_type for n in onnx.load(bundles / "int8" / files[name]).graph.node} for name in files}
    of_int8 = {"QuantizeLinear", "DequantizeLinear"}
    assert of_int8 < operators[bundle.UNET_DECODER] and of_int8 < operators[bundle.VAE_DECODER]
    assert not of_int8 & operators[bundle.UNET_ENCODER]  # whose errors every timestep would have

    float32, int8 = (Pipeline.load(bundles / p, device="cpu") for p in ("fp32", "int8"))
    expected, made = (p("a cat", seed=1, num_images=2, output_type="np").images for p in (float32, int8))
    assert INT8_FLOOR_DB < psnr(made, expected) < INT8_CEILING_DB
    # Constant ranges: what is drawn beside a picture, and how many timesteps at once, change nothing.
    alone = int8("a cat", seed=2, memory="sequential", output_type="np").images
    np.testing.assert_allclose(alone[0], made[1], atol=INT8_REORDERED)  # a sum in another order may round the other way


@pytest.mark.usefixtures("traced_once")
def test_prompts_of_ones_own(bundles, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    flags = ["--ckpt", str(bundles / "s.safetensors"), "--out", str(tmp_path / "out"), "--precision", "int8"]
    assert main([*flags, "--calibration-prompts", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert main([*flags, "--calibration-prompts", str(tmp_path / "prompts.txt")]) == 0
    assert (tmp_path / "out" / "unet_decoder.onnx").read_bytes() != (bundles / "int8/unet_decoder.onnx").read_bytes()


def test_int8_is_for_cpus():
    with pytest.raises(ExportError, match="CUDA has no such kernels"):
        Options(precision="int8", target=("portable", "cuda"))
    with pytest.raises(ExportError, match="`calibration_prompts` are for `precision` int8"):
        Options(calibration_prompts=("a cat",))
