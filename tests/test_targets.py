"""Targets and precisions: the operators of the graphs of each, and that the graphs compute the same."""

import sys
from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file
from test_export import LITTLE_NOISE, SCHEDULES, assert_refused, export
from tiue_runtime import BundleError, DeviceError, Pipeline, bundle
from tolerances import AMPLIFIED, EXTRA_FOR_CPU, MEASURED_128_MIB, REORDERED
from torch import nn

from export import cuda, cuda_definitions, plan, trace, translate, working_memory
from export import writer as files
from export.errors import ExportError
from export.export_options import Options
from export.parity import PSNR_FLOOR_DB
from tiue.checkpoint import Student
from tiue.hoist import hoist

CUDA32 = trace.GraphTarget(bundle.CUDA, torch.float32)
HALF = trace.GraphTarget(bundle.PORTABLE, torch.float16)


def psnr(made, expected):
    rmse = np.sqrt(np.mean((made.astype(np.float64) - expected) ** 2))
    return 20 * np.log10(np.ptp(expected) / rmse)


def operators(graph):
    return Counter(node.op_type for node in graph.graph)


def of_type(module, kind):
    return [m for m in module.modules() if isinstance(m, kind)]


def test_further_sizes_go_into_the_bundle_as_height_and_width():
    student = Student(tiny.with_unet(tiny.unet()), 751, SCHEDULES)
    manifest = plan.make_plan(student, Options(sizes=("64x32", "32x64"))).manifest
    own = (manifest.default_height, manifest.default_width)
    assert manifest.sizes == ((32, 64), (64, 32)) and manifest.made_for == (own, (32, 64), (64, 32))
    with pytest.raises(BundleError, match="multiple of size_multiple"):
        plan.make_plan(student, Options(sizes=("63x32",)))
    for size in ("64", "64*32", "0x32", "-64x32", "64x32x1"):
        with pytest.raises(ExportError, match="`sizes`: expected WIDTHxHEIGHT"):
            Options(sizes=(size,))


# The CUDA variant. A fusion that is lost changes a count.


@pytest.mark.parametrize("linear", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sd15", "sd21"])
def test_every_operator_with_a_cuda_kernel_is_fused(linear):
    """At the widths of SD's first level, since two of the kernels exist only for SD's widths."""
    unet = tiny.unet(block_out_channels=(320, 320), norm_num_groups=32, use_linear_projection=linear)
    tiue = Student(tiny.with_unet(unet), 751, SCHEDULES).tiue(4)
    encoder, decoder = trace.unet_graphs(tiue, SCHEDULES[4], 20, CUDA32)
    both = operators(encoder) + operators(decoder)
    halves = nn.ModuleList(hoist(tiue, SCHEDULES[4]))
    assert both["NhwcConv"] == len(of_type(halves, nn.Conv2d))
    assert both["GroupNorm"] + both["SkipGroupNorm"] == len(of_type(halves, nn.GroupNorm))
    # After a sum: the first norm of the encoder's later blocks, all but two of the decoder's, and those of attention.
    assert both["SkipGroupNorm"] == 14
    assert both["MultiHeadAttention"] == len(of_type(unet, Attention))
    assert both["BiasSplitGelu"] == len(of_type(unet, GEGLU))
    assert both["BiasAdd"] == len(of_type(unet, BasicTransformerBlock))
    assert not both.keys() & {"Conv", "InstanceNormalization", "Softmax", "Split", "Gelu", "Erf"}
    norms = [n for g in (encoder, decoder) for n in g.graph if n.op_type in ("GroupNorm", "SkipGroupNorm")]
    activated = sum(n.attributes["activation"].as_int() for n in norms)
    assert activated == len(of_type(halves, nn.GroupNorm)) - len(of_type(halves, Transformer2DModel))
    maps = [n for g in (encoder, decoder) for n in g.graph if n.op_type == "Transpose" and has_pixels(n)]
    assert len(maps) == 4  # the latents on their way in, the noise on its way out, and around the weighted sum
    assert cuda_definitions.lower(encoder) and cuda_definitions.lower(decoder)
    made, expected = latents(tiue, encoder, decoder, run)
    np.testing.assert_allclose(made, expected, atol=AMPLIFIED, rtol=0)


def run(graph, feeds):
    """Run a graph with ONNX Runtime on the CPU."""
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    made = session.run(names, {value.name: feeds[value.name] for value in session.get_inputs()})
    return dict(zip(names, made, strict=True))


def has_pixels(node):
    return 1 not in list(node.outputs[0].shape)[1:3]


def test_the_vae_is_fused():
    vae = tiny.sd15().vae
    made = operators(trace.vae_decoder_graph(vae, CUDA32))
    assert made["NhwcConv"] == len(of_type(vae.decoder, nn.Conv2d)) + 1  # post_quant_conv
    assert made["GroupNorm"] + made["SkipGroupNorm"] == len(of_type(vae.decoder, nn.GroupNorm))
    assert made["MultiHeadAttention"] == len(of_type(vae.decoder, Attention))
    assert not made.keys() & {"Conv", "InstanceNormalization", "Softmax", "Sigmoid"}


def test_onnx_runtime_takes_the_cuda_graph_but_for_its_kernels(tmp_path):
    """Its schemas are checked before its kernels are looked up."""
    path = tmp_path / "vae.onnx"
    ir.save(trace.vae_decoder_graph(tiny.sd15().vae, CUDA32), path)
    with pytest.raises(Exception, match=r"Could not find an implementation for \w*(NhwcConv|GroupNorm)"):
        ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_a_convolution_follows_no_unknown_layout():
    """Operators that are not known to keep their layout get the one they had."""
    x = ir.val("x", ir.DataType.FLOAT, ["n", 4, "h", "w"])
    weight = ir.val("weight", const_value=ir.tensor(np.ones((4, 4, 3, 3), np.float32)))
    conv = ir.node("Conv", [x, weight], {"pads": [1, 1, 1, 1]})
    softmax = ir.node("Softmax", [conv.outputs[0]], {"axis": 1})
    for node in (conv, softmax):
        node.outputs[0].shape, node.outputs[0].dtype = x.shape, x.dtype
    softmax.outputs[0].name = "y"
    graph = ir.Graph([x], softmax.outputs, nodes=[conv, softmax], initializers=[weight], opset_imports={"": 18})
    model = ir.Model(graph, ir_version=10)
    cuda.fuse(model)
    assert [node.op_type for node in graph] == ["Transpose", "NhwcConv", "Transpose", "Softmax"]
    assert [value.name for value in graph.outputs] == ["y"]


def test_lowering_counts_what_it_replaces():
    graph = trace.vae_decoder_graph(tiny.v_prediction().vae, CUDA32)
    expected = operators(graph)["NhwcConv"]
    assert cuda_definitions.lower(graph) == expected > 0
    assert cuda_definitions.lower(graph) == 0


# float16. Parts that overflow stay in float32: without that, the same weights give no picture.


# ONNX Runtime's CPU provider computes in float32 whatever the graph says, so onnx's own evaluator tells here.


def evaluate(graph, feeds):
    evaluator = ReferenceEvaluator(ir.to_proto(graph))
    with np.errstate(over="ignore", invalid="ignore"):
        made = evaluator.run(None, {name: feeds[name] for name in evaluator.input_names})
    return dict(zip(evaluator.output_names, made, strict=True))


def loud_latents():
    """Latents with products of queries and keys beyond float16's 65504, also when scaled.

    Each factor is well within. The UNet has no more than its first and last block.
    """
    unet = tiny.one_level_unet(use_linear_projection=True, attention_head_dim=2, mid_block_type=None)
    for attention in of_type(unet, Attention):
        for projection in (attention.to_q, attention.to_k):
            projection.weight.data *= 400
    tiue = Student(tiny.with_unet(unet), 751, SCHEDULES).tiue(2)
    return latents(tiue, *trace.unet_graphs(tiue, SCHEDULES[2], 20, HALF), evaluate)


def loud_vae():
    """Activations beyond float16 in the last block, as Stable Diffusion's VAEs have."""
    vae = tiny.sd15().vae
    vae.decoder.up_blocks[-1].resnets[-1].conv2.weight.data *= 1e6
    return vae


def test_attention_beyond_float16():
    made, expected = loud_latents()
    assert psnr(made, expected) > PSNR_FLOOR_DB


def test_attention_beyond_float16_is_lost_without_float32(monkeypatch):
    monkeypatch.setattr(trace, "FLOAT16", translate.PLAIN)
    made, _ = loud_latents()
    assert not np.isfinite(made).all()


@torch.no_grad()
def latents(tiue, encoder, decoder, run):
    """Return latents by two graphs, which `run` runs, and by PyTorch in float32."""
    generator = torch.Generator().manual_seed(0)
    noise, text = torch.randn(2, 4, 4, 2, generator=generator), torch.randn(2, 20, 16, generator=generator)
    weights = np.array(tiue.schedule.step_weights, np.float32)
    feeds = {bundle.LATENTS: noise.numpy(), bundle.TEXT: text.numpy()}
    feeds |= {bundle.STEP_INDEX: np.arange(len(weights)), bundle.STEP_WEIGHT: weights}
    feeds |= run(encoder, feeds)
    made = tiue.schedule.noise_weight * feeds[bundle.LATENTS] + run(decoder, feeds)[bundle.CONTRIBUTION]
    return made, tiue(noise, text).numpy()


@pytest.mark.parametrize("tail_in_float32", [True, False])
@torch.no_grad()
def test_a_vae_beyond_float16(tail_in_float32, monkeypatch):
    if not tail_in_float32:
        monkeypatch.setattr(trace, "overflowing", lambda vae: ())
    vae = loud_vae()
    z = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    made = evaluate(trace.vae_decoder_graph(vae, HALF), {bundle.LATENTS: z.numpy()})[bundle.IMAGE]
    if tail_in_float32:
        assert psnr(made, vae.decode(z / vae.config.scaling_factor, return_dict=False)[0].numpy()) > PSNR_FLOOR_DB
    else:
        assert not np.isfinite(made).all()


@pytest.mark.parametrize(("pads", "shift"), [(False, None), (False, 0.3), (True, None), (True, 0.3)])
@torch.no_grad()
def test_the_vaes_scaling_is_folded(pads, shift):
    """Into a 1x1 convolution, where there is one; else into one that pads, which a shift would not survive."""
    own = {name: value for name, value in tiny.sd15().vae.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    vae = AutoencoderKL(**own | {"use_post_quant_conv": not pads, "shift_factor": shift}).eval()
    z_0 = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(z_0 / vae.config.scaling_factor + (shift or 0.0), return_dict=False)[0]
    decoder = trace.VaeDecoder(vae, torch.float32)
    assert (decoder.scale == 1.0) == (not (pads and shift))
    assert (decoder(z_0) - expected).abs().max() < REORDERED


# Bundles with all of it.


@pytest.fixture(scope="session")
def rich(tmp_path_factory):
    """A bundle of all targets and both image decoders, in float16."""
    root = tmp_path_factory.mktemp("rich")
    tiny.save_pipeline(tiny.with_unet(tiny.one_level_unet()), root / "pipeline")
    tiny.taesd().save_pretrained(root / "taesd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SHARED_ABOVE", 256)
        arguments = (
            "--target",
            "portable,cpu,cuda",
            "--precision",
            "fp16",
            "--vae",
            "kl,tiny",
            "--vae-path",
            root / "taesd",
        )
        assert export("--ckpt", root / "pipeline", "--out", root / "bundle", *arguments) == 0
    return root / "bundle"


@pytest.mark.slow
@pytest.mark.filterwarnings(LITTLE_NOISE)
def test_a_text_encoder_in_int8_beside_float16(tmp_path):
    tiny.save_pipeline(tiny.sd15(), tmp_path / "pipeline")
    arguments = ("--precision", "fp16", "--text-encoder", "int8", "--target", "cuda", "--steps", "1")
    assert export("--ckpt", tmp_path / "pipeline", "--out", tmp_path / "out", *arguments) == 0
    made = bundle.Bundle.load(tmp_path / "out")
    assert list(made.manifest.variants) == [bundle.CUDA]
    text_encoder = ir.load(made.graph_path(bundle.TEXT_ENCODER, bundle.CUDA))
    assert any(v.dtype == ir.DataType.INT8 for v in text_encoder.graph.initializers.values())
    with pytest.raises(DeviceError, match="cpu runs cpu, portable or web graphs, the bundle holds only cuda"):
        Pipeline.load(tmp_path / "out", device="cpu")


def test_a_tiny_vae_that_is_none(tmp_path, capsys):
    pipeline = tiny.save_pipeline(tiny.sd15(), tmp_path / "pipeline")
    damaged = tmp_path / "damaged"
    tiny.taesd().save_pretrained(damaged)
    weights = load_file(damaged / "diffusion_pytorch_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, damaged / "diffusion_pytorch_model.safetensors")
    for path, message in ((pipeline / "vae", "AutoencoderKL is not supported"), (damaged, "it lacks tensor")):
        capsys.readouterr()
        status = export("--ckpt", pipeline, "--out", tmp_path / "out", "--vae", "tiny", "--vae-path", path)
        assert_refused(capsys, status, message, tmp_path, ["damaged", "pipeline"])


def test_a_bundle_of_everything(rich):
    made = bundle.Bundle.load(rich)
    made.verify()
    assert tuple(made.manifest.variants) == (bundle.PORTABLE, bundle.CPU, bundle.CUDA)
    assert made.manifest.vae_graphs == {"kl": "vae_decoder", "tiny": "vae_decoder_tiny"}
    assert (made.manifest.precision, made.manifest.weights) == ("fp16", "fp16")
    pictures = {kind: Pipeline.load(rich, device="cpu", vae=kind)("a cat", seed=1).images for kind in ("kl", "tiny")}
    assert not np.array_equal(pictures["kl"][0], pictures["tiny"][0])


def test_the_cpu_gets_its_own_graphs(rich):
    """They hold the same weights, attention in one operator, and compute in float32 what is stored in float16."""
    pipelines = {variant: Pipeline.load(rich, device="cpu", variant=variant) for variant in (None, "cpu", "portable")}
    assert {pipeline.variant for pipeline in pipelines.values()} == {"cpu", "portable"}
    assert pipelines[None].variant == "cpu"
    made = {v: p("a cat", seed=1, output_type="latent").images for v, p in pipelines.items()}
    assert np.array_equal(made[None], made["cpu"])
    assert PSNR_FLOOR_DB < psnr(made["cpu"], made["portable"]) < np.inf
    manifest = bundle.Bundle.load(rich)
    decoder = ir.load(manifest.graph_path(bundle.UNET_DECODER, bundle.CPU))
    unet = tiny.one_level_unet()
    assert operators(decoder)["MultiHeadAttention"] == len(of_type(unet.up_blocks, Attention))
    assert operators(decoder)["Gelu"] == len(of_type(unet.up_blocks, GEGLU))
    assert not operators(decoder).keys() & {"Softmax", "Erf"}
    portable, extra = (manifest.manifest.files[f"unet_decoder{s}.onnx.data"].size for s in ("", ".cpu"))
    assert extra < EXTRA_FOR_CPU * portable


def test_large_models_get_graphs_for_the_cpu_unasked(monkeypatch):
    student = Student(tiny.sd15(), 751, SCHEDULES)
    assert plan.default_targets(student) == (bundle.PORTABLE,)
    monkeypatch.setattr(plan, "EXTERNAL_ABOVE", 10_000)
    assert plan.default_targets(student) == (bundle.PORTABLE, bundle.CPU)


def test_variants_share_their_weights(rich):
    """All but the convolutions, whose layout differs, is there once."""

    def places(variant, graph):
        model = ir.load(bundle.Bundle.load(rich).graph_path(graph, variant))
        tensors = [v.const_value for v in model.graph.initializers.values()]
        return {(t.location, t.offset) for t in tensors if isinstance(t, ir.ExternalTensor) and len(t.shape) == 2}

    for graph in (bundle.UNET_ENCODER, bundle.UNET_DECODER):
        matrices = places(bundle.CUDA, graph)
        assert matrices and matrices <= places(bundle.PORTABLE, graph) | places(bundle.PORTABLE, bundle.UNET_DECODER)


def test_the_tiny_vae_takes_the_same_latents(rich):
    """Each VAE's scaling is in its graph, so that the runtime need not know which one it has."""
    taesd = tiny.taesd()
    z_0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tiny_session = ort.InferenceSession(bundle.Bundle.load(rich).graph_path("vae_decoder_tiny"))
    made = tiny_session.run(None, {bundle.LATENTS: z_0.numpy()})[0]
    with torch.no_grad():
        expected = taesd.decode(z_0 / taesd.config.scaling_factor, return_dict=False)[0].numpy()
    assert psnr(made, expected) > PSNR_FLOOR_DB


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_working_memory_is_measured(rich):
    uses = bundle.Bundle.load(rich).manifest.memory[bundle.PORTABLE]
    assert uses.keys() <= {bundle.UNET_DECODER, bundle.VAE_DECODER, "vae_decoder_tiny"}
    assert uses[bundle.UNET_DECODER].bytes(1, 64) > 0


def test_memory_fit():
    def run(rows, latents, taken, variant=bundle.CPU, graph=bundle.UNET_DECODER):
        return working_memory.GraphRun(variant, graph, rows, latents, taken)

    exact = [run(rows, hw, rows * (3 * hw + 2 * hw**2)) for rows, hw in ((1, 10), (4, 10), (1, 40))]
    use = working_memory.fit(exact)
    assert (use.per_latent, use.per_latent_squared) == pytest.approx((3, 2))
    # Less than in proportion: no term may be negative.
    shrinking = working_memory.fit([run(1, 10, 100), run(1, 40, 200)])
    assert shrinking.per_latent_squared == 0 and shrinking.per_latent > 0
    others = [run(1, 10, 7, variant=bundle.CUDA), run(1, 10, 7, graph=bundle.UNET_ENCODER)]
    assert working_memory.fit_runs([*others, *exact]) == {bundle.CPU: {bundle.UNET_DECODER: use}}


def test_measured_memory_is_that_of_the_run():
    _, taken = working_memory.measured(lambda: np.ones(2**24).sum())
    if sys.platform == "linux":
        least, most = MEASURED_128_MIB
        assert least < taken < most
    else:
        assert taken is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "fp16", "--weights", "fp32"), "--weights fp32"),
        (("--vae", "tiny"), "--vae-path"),
        (("--vae", "tiny", "--vae-path", "nowhere"), "no such directory: nowhere"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, capsys, arguments, message):
    tiny.save_pipeline(tiny.sd15(), tmp_path / "pipeline")
    capsys.readouterr()
    status = export("--ckpt", tmp_path / "pipeline", "--out", tmp_path / "out", *arguments)
    assert_refused(capsys, status, message, tmp_path, ["pipeline"])


def test_a_variant_for_another_device(rich):
    with pytest.raises(DeviceError, match="cpu runs cpu, portable or web graphs, got 'cuda'"):
        Pipeline.load(rich, device="cpu", variant=bundle.CUDA)
