"""The UNet and VAE graphs: thin modules whose `forward` is the graph's signature, and their tracing."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from onnxscript.optimizer import optimize
from tiue_runtime import bundle
from torch import Tensor, nn
from torch.export import Dim

from tiue.unet import Features, TiUE

from .cuda import fuse
from .errors import ExportError
from .quiet import quiet
from .translate import CUDA, FLOAT16, PLAIN, TO_CHANNELS_FIRST, TO_CHANNELS_LAST, Translations

OPSET = 18  # from 21 on GroupNormalization is an operator, for which ONNX Runtime has no kernel
MID, SKIP = "mid", "skip_"  # features are named mid, skip_0, skip_1 ...


@dataclass(frozen=True)
class Form:
    """What a graph is made for and computes in."""

    target: str  # bundle.PORTABLE: standard operators; bundle.CUDA: ONNX Runtime's with CUDA kernels, channels last
    dtype: torch.dtype  # float32, or float16 with the parts that overflow in float32

    @property
    def channels_last(self) -> bool:
        """Whether features are (B,h,w,C)."""
        return self.target == bundle.CUDA

    @property
    def translations(self) -> Translations:
        """Operators that are not left to the exporter."""
        if self.target == bundle.CUDA:
            return CUDA
        return FLOAT16 if self.dtype == torch.float16 else PLAIN


class UnetEncoder(nn.Module):
    """The graph of the shared encoder."""

    temb: Tensor

    def __init__(self, tiue: TiUE, form: Form, temb: Tensor):
        """temb: the embedding (1,E) of the encoder's timestep, which is fixed, so a constant of the graph."""
        super().__init__()
        self.tiue = tiue
        self.form = form
        self.register_buffer("temb", temb.to(form.dtype))

    def forward(self, latents: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """latents (B,C,h,w), text (B,L,D), float32 => the features: mid, then the skips."""
        latents, text = latents.to(self.form.dtype), text.to(self.form.dtype)
        features = self.tiue.encode_embedded(latents, self.temb.expand(latents.shape[0], -1), text)
        if self.form.channels_last:
            return tuple(feature.permute(TO_CHANNELS_LAST) for feature in (features.mid, *features.skips))
        return features.mid, *features.skips


class UnetDecoder(nn.Module):
    """The graph of the decoder at any of the timesteps, and of its share in the weighted sum."""

    table: Tensor

    def __init__(self, tiue: TiUE, form: Form, table: Tensor):
        """table: the embeddings (T,E) of the decoder's timesteps."""
        super().__init__()
        self.tiue = tiue
        self.form = form
        self.register_buffer("table", table.to(form.dtype))

    def forward(self, features: Sequence[Tensor], text: Tensor, step_index: Tensor, step_weight: Tensor) -> Tensor:
        """features, text, step_index int64 (k), step_weight (k) => sum_k step_weight_k eps_k (B,C,h,w)."""
        k, batch = step_index.shape[0], text.shape[0]
        temb = self.table[step_index][:, None].expand(k, batch, -1).flatten(0, 1)  # step-major
        if self.form.channels_last:
            features = [feature.permute(TO_CHANNELS_FIRST) for feature in features]
        text = text.to(self.form.dtype)
        eps = self.tiue.decode_embedded(Features(features[0], tuple(features[1:])), temb, text).float()
        return (step_weight[:, None, None, None, None] * eps.unflatten(0, (k, batch))).sum(0)


class VaeDecoder(nn.Module):
    """The graph of a VAE's decoder, of whichever kind."""

    def __init__(self, vae: Any, dtype: torch.dtype, replaced: Any = None):
        """replaced: the VAE for whose latents, unscaled, this one is to be fed, if not for its own."""
        super().__init__()
        self.factor, self.offset = 1.0, 0.0
        if replaced is not None:  # x = z_0 / scale + shift, of either: from the one's to the other's
            (scale, shift), (own_scale, own_shift) = _scaling(replaced), _scaling(vae)
            self.factor = scale / own_scale
            self.offset = own_shift - shift * self.factor
        self.dtype = dtype
        tail = _tail(vae) if dtype == torch.float16 and isinstance(vae, AutoencoderKL) else ()
        self.vae = _in_precision(vae, dtype, but=tail)
        if tail:
            self.vae.get_submodule(tail[0]).register_forward_pre_hook(_widen)

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B,C,h,w), unscaled => image (B,3,H,W) in [-1,1]."""
        if (self.factor, self.offset) != (1.0, 0.0):
            latents = latents * self.factor + self.offset
        return self.vae.decode(latents.to(self.dtype), return_dict=False)[0].float()


def unet_graphs(
    tiue: TiUE, decoder_timesteps: Sequence[int], text_length: int, form: Form
) -> tuple[ir.Model, ir.Model]:
    """Trace both halves, with every size dynamic: (unet_encoder, unet_decoder)."""
    config = tiue.unet.config
    with torch.no_grad():  # embedded in float32, whatever the graphs compute in
        temb, table = (tiue.embed(torch.tensor(t), torch.float32) for t in ([tiue.encoder_timestep], decoder_timesteps))
    tiue = TiUE(_in_precision(tiue.unet, form.dtype), tiue.schedule, tiue.encoder_timestep)
    # A batch of two, three steps, and not square: no size is mistaken for another, or for 1.
    multiple = 2**tiue.unet.num_upsamplers
    latents = torch.randn(2, config["in_channels"], 2 * multiple, 3 * multiple)
    text = torch.randn(2, text_length, config["cross_attention_dim"])
    batch, height, width, steps = (Dim(name) for name in ("batch", "height", "width", "steps"))
    rows = 1 if form.channels_last else 2  # the axis of the features' heights

    def plane(feature: Tensor, axis: int) -> dict[int, Any]:
        """The dynamic shape of a map: height and width count units of the coarsest feature's pixels."""
        factor = feature.shape[axis] // 2
        return {0: batch, axis: factor * height, axis + 1: factor * width}

    encoder = UnetEncoder(tiue, form, temb).eval()
    with torch.no_grad():
        features = encoder(latents, text)
    names = [MID, *(f"{SKIP}{i}" for i in range(len(features) - 1))]
    encoder_graph = _trace(
        encoder,
        (latents, text),
        form,
        dynamic_shapes=(plane(latents, 2), {0: batch}),
        input_names=[bundle.LATENTS, bundle.TEXT],
        output_names=names,
    )
    decoder_graph = _trace(
        UnetDecoder(tiue, form, table).eval(),
        (list(features), text, torch.zeros(3, dtype=torch.int64), torch.ones(3)),
        form,
        dynamic_shapes=([plane(f, rows) for f in features], {0: batch}, {0: steps}, {0: steps}),
        input_names=[*names, bundle.TEXT, bundle.STEP_INDEX, bundle.STEP_WEIGHT],
        output_names=[bundle.CONTRIBUTION],
    )
    return encoder_graph, decoder_graph


def vae_decoder_graph(vae: Any, form: Form, replaced: Any = None) -> ir.Model:
    """Trace a VAE's decoder: latents (B,C,h,w), unscaled => image (B,3,H,W) in [-1,1].

    Args:
        vae: an AutoencoderKL or AutoencoderTiny.
        replaced: the VAE whose place this one takes, or beside which it stands, so that both take the same latents.
    """
    batch, height, width = (Dim(name) for name in ("batch", "height", "width"))
    return _trace(
        VaeDecoder(vae, form.dtype, replaced).eval(),
        (torch.randn(2, vae.config["latent_channels"], 16, 24),),
        form,
        dynamic_shapes=({0: batch, 2: height, 3: width},),
        input_names=[bundle.LATENTS],
        output_names=[bundle.IMAGE],
    )


def _trace(module: nn.Module, args: tuple[Any, ...], form: Form, **options: Any) -> ir.Model:
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                args,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=dict(form.translations),
                **options,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(f"{type(module).__name__} cannot be traced: {reason}") from error
    assert program is not None  # None only from the exporter that dynamo=True replaces
    if form.target == bundle.CUDA:
        fuse(program.model)
    return program.model


def forget_graphs() -> None:
    """Let go of the graph traced last: onnxscript's rules keep it, with its weights, until they see another."""
    x = ir.val("x", ir.DataType.FLOAT, [])
    node = ir.node("Identity", [x])
    optimize(ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": OPSET}), ir_version=10))


def _scaling(vae: Any) -> tuple[float, float]:
    return vae.config["scaling_factor"], vae.config.get("shift_factor") or 0.0


def _in_precision(module: Any, dtype: torch.dtype, but: Sequence[str] = ()) -> Any:
    """`module` itself in its own precision, else a copy with nothing but the weights copied, those of `but` as is."""
    if module.dtype == dtype:
        return module
    with init_empty_weights(), quiet():
        copy = type(module).from_config(module.config)
    kept = tuple(f"{name}." for name in but)
    weights = {name: t if name.startswith(kept) else t.to(dtype) for name, t in module.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


def _tail(vae: Any) -> list[str]:
    """The later half of a KL decoder, whose activations are the ones that exceed float16: the submodules' names."""
    count = len(vae.decoder.up_blocks)
    blocks = [f"decoder.up_blocks.{i}" for i in range(count // 2, count)]
    return [*blocks, "decoder.conv_norm_out", "decoder.conv_out"]


def _widen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].float(), *args[1:]
