"""The two UNet graphs: thin modules whose `forward` is the graph's signature, and their tracing."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from tiue_runtime import bundle
from torch import Tensor, nn
from torch.export import Dim

from tiue.unet import Features, TiUE

from .quiet import quiet

OPSET = 18  # from 21 on GroupNormalization is an operator, for which ONNX Runtime has no kernel
MID = "mid"  # features are named mid, skip_0, skip_1 ...


class UnetEncoder(nn.Module):
    """The graph of the shared encoder."""

    temb: Tensor

    def __init__(self, tiue: TiUE):
        super().__init__()
        self.tiue = tiue
        # The timestep is fixed, so its embedding (1,E) is a constant of the graph.
        self.register_buffer("temb", _embed(tiue, [tiue.encoder_timestep]))

    def forward(self, latents: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """latents (B,C,h,w), text (B,L,D) => the features: mid, then the skips."""
        features = self.tiue.encode_embedded(latents, self.temb.expand(latents.shape[0], -1), text)
        return features.mid, *features.skips


class UnetDecoder(nn.Module):
    """The graph of the decoder at any of the timesteps, and of its share in the weighted sum."""

    table: Tensor

    def __init__(self, tiue: TiUE, decoder_timesteps: Sequence[int]):
        super().__init__()
        self.tiue = tiue
        self.register_buffer("table", _embed(tiue, decoder_timesteps))  # (T,E), see UnetEncoder.temb

    def forward(self, features: Sequence[Tensor], text: Tensor, step_index: Tensor, step_weight: Tensor) -> Tensor:
        """features, text, step_index int64 (k), step_weight (k) => sum_k step_weight_k eps_k (B,C,h,w)."""
        k, batch = step_index.shape[0], text.shape[0]
        temb = self.table[step_index][:, None].expand(k, batch, -1).flatten(0, 1)  # step-major
        eps = self.tiue.decode_embedded(Features(features[0], tuple(features[1:])), temb, text)
        return (step_weight[:, None, None, None, None] * eps.unflatten(0, (k, batch))).sum(0)


def unet_graphs(tiue: TiUE, decoder_timesteps: Sequence[int], text_length: int) -> tuple[ir.Model, ir.Model]:
    """Trace both halves, with every size dynamic: (unet_encoder, unet_decoder)."""
    config = tiue.unet.config
    # A batch of two, three steps, and not square: no size is mistaken for another, or for 1.
    multiple = 2**tiue.unet.num_upsamplers
    latents = torch.randn(2, config["in_channels"], 2 * multiple, 3 * multiple)
    text = torch.randn(2, text_length, config["cross_attention_dim"])
    batch, height, width, steps = (Dim(name) for name in ("batch", "height", "width", "steps"))

    def plane(feature: Tensor) -> dict[int, Any]:
        """The dynamic shape of a map: height and width count units of the coarsest feature's pixels."""
        factor = feature.shape[2] // 2
        return {0: batch, 2: factor * height, 3: factor * width}

    encoder = UnetEncoder(tiue).eval()
    with torch.no_grad():
        features = encoder(latents, text)
    names = [MID, *(f"skip_{i}" for i in range(len(features) - 1))]
    encoder_graph = _trace(
        encoder,
        (latents, text),
        dynamic_shapes=(plane(latents), {0: batch}),
        input_names=[bundle.LATENTS, bundle.TEXT],
        output_names=names,
    )
    decoder_graph = _trace(
        UnetDecoder(tiue, decoder_timesteps).eval(),
        (list(features), text, torch.zeros(3, dtype=torch.int64), torch.ones(3)),
        dynamic_shapes=([plane(f) for f in features], {0: batch}, {0: steps}, {0: steps}),
        input_names=[*names, bundle.TEXT, bundle.STEP_INDEX, bundle.STEP_WEIGHT],
        output_names=[bundle.CONTRIBUTION],
    )
    return encoder_graph, decoder_graph


def _trace(module: nn.Module, args: tuple[Any, ...], **options: Any) -> ir.Model:
    with quiet(), torch.no_grad():
        program = torch.onnx.export(module, args, dynamo=True, opset_version=OPSET, verbose=False, **options)
    assert program is not None  # None only from the exporter that dynamo=True replaces
    return program.model


def _embed(tiue: TiUE, timesteps: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return tiue.embed(torch.tensor(timesteps), torch.float32)
