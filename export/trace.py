"""Tracing the UNet and the image decoders: thin modules whose `forward` is the signature of the graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import onnx_ir as ir
import torch
from diffusers import AutoencoderKL
from onnxscript.optimizer import optimize
from tiue_runtime import bundle
from torch import Tensor, nn
from torch.export import Dim

from export.cuda import fuse
from export.errors import ExportError
from export.quiet import quiet
from export.translate import CONTRIB, CPU, CUDA, FLOAT16, PLAIN, TO_CHANNELS_FIRST, TO_CHANNELS_LAST, Translations
from export.upscaler import LoadedUpscaler
from tiue.components import latent_scaling
from tiue.files import one_line
from tiue.hoist import HoistedDecoder, HoistedEncoder, alias_weights, hoist
from tiue.safety_checker import SafetyChecker, Scorer
from tiue.unet import TiUE

OPSET = 18  # From opset 21 on GroupNormalization is an operator, for which ONNX Runtime has no kernel.
_UPSCALER_SIDE = 8  # The sides of the traced picture are multiples of it.
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class GraphTarget:
    """The device that a graph is made for, and the precision that it computes in."""

    name: str  # of bundle.VARIANTS: standard operators, or ONNX Runtime's with kernels for that device
    dtype: torch.dtype  # float32; or float16, with float32 in the parts that overflow

    @property
    def channels_last(self) -> bool:
        """Whether features are (B, h, w, C)."""
        return self.name == bundle.CUDA

    @property
    def translations(self) -> Translations:
        """The operators that PyTorch's own exporter does not translate."""
        if self.name != bundle.PORTABLE:
            # ONNX Runtime for browsers has the CPU's operators, and its WebGPU provider has kernels for most of them.
            return {bundle.CPU: CPU, bundle.CUDA: CUDA, bundle.WEB: CPU}[self.name]
        return FLOAT16 if self.dtype == torch.float16 else PLAIN


class UnetEncoder(nn.Module):
    """The graph that runs once per picture."""

    def __init__(self, encoder: HoistedEncoder, target: GraphTarget):
        super().__init__()
        self.encoder = _in_precision(encoder, target.dtype)
        self.target = target

    def forward(self, latents: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """Latents (B, C, h, w) and text (B, L, D), both float32 => the features."""
        features = self.encoder(latents.to(self.target.dtype), text.to(self.target.dtype))
        return tuple(self._laid_out(feature) for feature in features)

    def _laid_out(self, feature: Tensor) -> Tensor:
        return feature.permute(TO_CHANNELS_LAST) if self.target.channels_last and feature.ndim == 4 else feature


class UnetDecoder(nn.Module):
    """The graph that runs at any of the timesteps and returns its part of the weighted sum."""

    def __init__(self, decoder: HoistedDecoder, target: GraphTarget):
        super().__init__()
        self.decoder = _in_precision(decoder, target.dtype, but=["weighted_sum"])
        self.target = target

    def forward(self, features: Sequence[Tensor], step_index: Tensor, step_weight: Tensor) -> Tensor:
        """Features, step_index int64 (k), step_weight (k) => sum_k step_weight_k eps_k (B, C, h, w), float32."""
        return self.decoder([self._laid_out(feature) for feature in features], step_index, step_weight)

    def _laid_out(self, feature: Tensor) -> Tensor:
        return feature.permute(TO_CHANNELS_FIRST) if self.target.channels_last and feature.ndim == 4 else feature


class VaeDecoder(nn.Module):
    """The graph of an image decoder of any kind. It undoes the scaling of its latents."""

    def __init__(self, vae: Any, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        kl = isinstance(vae, AutoencoderKL)
        tail = overflowing(vae) if dtype == torch.float16 and kl else ()
        self.vae = _in_precision(vae, dtype, but=tail)
        if tail:
            self.vae.get_submodule(tail[0]).register_forward_pre_hook(_widen)
        self.scale, self.shift = latent_scaling(vae)
        if kl:
            self._fold(self.vae, vae)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents z_0 (B, C, h, w), as the UNet makes them => image (B, 3, H, W) in [-1, 1]."""
        if (self.scale, self.shift) != (1.0, 0.0):
            latents = latents / self.scale + self.shift
        return self.vae.decode(latents.to(self.dtype), return_dict=False)[0].float()

    def _fold(self, copy: Any, vae: Any) -> None:
        """Fold the scaling into the first convolution.

        A shift cannot be folded into a convolution that pads: the padding would have to be shifted, too.
        """
        exact = vae.post_quant_conv is not None
        first, own = (
            (vae.post_quant_conv, copy.post_quant_conv) if exact else (vae.decoder.conv_in, copy.decoder.conv_in)
        )
        if self.shift and not exact:
            return
        weight, bias = first.weight.detach(), first.bias.detach()
        own.weight = nn.Parameter((weight / self.scale).to(self.dtype), requires_grad=False)
        own.bias = nn.Parameter((bias + self.shift * weight.sum((1, 2, 3))).to(self.dtype), requires_grad=False)
        self.scale, self.shift = 1.0, 0.0


def unet_graphs(
    tiue: TiUE, decoder_timesteps: Sequence[int], text_length: int, target: GraphTarget
) -> tuple[ir.Model, ir.Model]:
    """Trace both halves of the UNet, with every size dynamic.

    Args:
        tiue: the student.
        decoder_timesteps: the timesteps that step_index selects from.
        text_length: L.
        target: the device and the precision of the graphs.

    Returns:
        (unet_encoder, unet_decoder)

    Raises:
        ExportError: a half cannot be traced.
    """
    config = tiue.unet.config
    encoder, decoder = hoist(tiue, decoder_timesteps)
    names = encoder.names
    # A batch of two, three steps and a shape that is not square: the tracer mistakes no size for another, or for 1.
    multiple = 2**tiue.unet.num_upsamplers
    latents = torch.randn(2, config["in_channels"], 2 * multiple, 3 * multiple)
    text = torch.randn(2, text_length, config["cross_attention_dim"])
    batch, height, width, steps = (Dim(name) for name in ("batch", "height", "width", "steps"))
    height_axis = 1 if target.channels_last else 2  # of the features

    def plane(feature: Tensor, axis: int) -> dict[int, Any]:
        """Return the dynamic shape of a map. Height and width count the pixels of the coarsest feature."""
        if feature.ndim != 4:  # the keys and values of the text
            return {0: batch}
        factor = feature.shape[axis] // 2
        return {0: batch, axis: factor * height, axis + 1: factor * width}

    graph = UnetEncoder(encoder, target).eval()
    with torch.no_grad():
        features = graph(latents, text)
    encoder_graph = _trace(
        graph,
        (latents, text),
        target,
        dynamic_shapes=(plane(latents, 2), {0: batch}),
        input_names=[bundle.LATENTS, bundle.TEXT],
        output_names=list(names),
    )
    decoder_graph = _trace(
        UnetDecoder(decoder, target).eval(),
        (list(features), torch.zeros(3, dtype=torch.int64), torch.ones(3)),
        target,
        dynamic_shapes=([plane(f, height_axis) for f in features], {0: steps}, {0: steps}),
        input_names=[*names, bundle.STEP_INDEX, bundle.STEP_WEIGHT],
        output_names=[bundle.CONTRIBUTION],
    )
    return encoder_graph, decoder_graph


def vae_decoder_graph(vae: Any, target: GraphTarget) -> ir.Model:
    """Trace the decoder of an AutoencoderKL or AutoencoderTiny.

    Returns:
        A graph: latents z_0 (B, C, h, w) => image (B, 3, H, W) in [-1, 1].

    Raises:
        ExportError: the decoder cannot be traced.
    """
    batch, height, width = (Dim(name) for name in ("batch", "height", "width"))
    return _trace(
        VaeDecoder(vae, target.dtype).eval(),
        (torch.randn(2, vae.config["latent_channels"], 16, 24),),
        target,
        dynamic_shapes=({0: batch, 2: height, 3: width},),
        input_names=[bundle.LATENTS],
        output_names=[bundle.IMAGE],
    )


def safety_checker_graph(checker: SafetyChecker) -> ir.Model:
    """Trace a safety checker in standard operators and float32, for all devices.

    Returns:
        A graph: image (B, 3, S, S) in [-1, 1], as `bundle.SafetyChecker` prepares it => score (B).

    Raises:
        ExportError: it cannot be traced.
    """
    side = checker.processor.crop_size["height"]
    return _trace(
        Scorer(checker).eval(),
        (torch.randn(2, 3, side, side),),
        GraphTarget(bundle.PORTABLE, torch.float32),
        dynamic_shapes=({0: Dim("batch")},),
        input_names=[bundle.IMAGE],
        output_names=[bundle.SCORE],
    )


def upscaler_graph(upscaler: LoadedUpscaler) -> ir.Model:
    """Trace an upscaler in standard operators and float32, for all devices.

    Returns:
        A graph: image (B, 3, H, W) in [-1, 1] => enlarged (B, 3, scale * H, scale * W).

    Raises:
        ExportError: it cannot be traced with sizes that vary.
    """
    multiple = upscaler.multiple
    height, width = (multiple * Dim(name) if multiple > 1 else Dim(name) for name in ("height", "width"))
    return _trace(
        upscaler.module,
        (torch.rand(2, 3, 4 * multiple * _UPSCALER_SIDE, 6 * multiple * _UPSCALER_SIDE),),
        GraphTarget(bundle.PORTABLE, torch.float32),
        dynamic_shapes=({0: Dim("batch"), 2: height, 3: width},),
        input_names=[bundle.IMAGE],
        output_names=[bundle.ENLARGED],
    )


def _trace(module: nn.Module, args: tuple[Any, ...], target: GraphTarget, **options: Any) -> ir.Model:
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                args,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=dict(target.translations),
                **options,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = one_line(error.__cause__ or error)
        raise ExportError(f"{type(module).__name__} cannot be traced: {reason}") from error
    assert program is not None  # Only the older exporter, without dynamo=True, returns None.
    if target.name == bundle.CUDA:
        fuse(program.model)
    if target.name != bundle.PORTABLE:
        program.model.opset_imports[CONTRIB] = 1
    return program.model


def forget_graphs() -> None:
    """Free the graph traced last, which onnxscript's rules keep, with its weights, until they see another."""
    x = ir.val("x", ir.DataType.FLOAT, [])
    node = ir.node("Identity", [x])
    optimize(ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": OPSET}), ir_version=10))


def _in_precision(module: M, dtype: torch.dtype, but: Sequence[str] = ()) -> M:
    """Copy a module in a precision. Submodules named by `but` keep theirs, and weights that stay are not copied."""
    copy = alias_weights(module).eval()
    kept = {name: copy.get_submodule(name) for name in but}
    for name in kept:
        copy.set_submodule(name, nn.Identity())
    copy.to(dtype)
    for name, submodule in kept.items():
        copy.set_submodule(name, submodule)
    return copy


def overflowing(vae: Any) -> list[str]:
    """Return the names of a KL decoder's submodules whose activations can exceed float16: its later half."""
    count = len(vae.decoder.up_blocks)
    blocks = [f"decoder.up_blocks.{i}" for i in range(count // 2, count)]
    return [*blocks, "decoder.conv_norm_out", "decoder.conv_out"]


def _widen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].float(), *args[1:]
