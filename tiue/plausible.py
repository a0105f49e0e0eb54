"""A check that configurations, which anybody can write, describe a model that runs."""

import math

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tiue.components import Components, ComponentsError, decode_latents, latent_scaling
from tiue.files import one_line
from tiue.text_encoder import encode_text
from tiue.unet import TiUE


def check_runs(components: Components, network: TiUE) -> None:
    """Refuse a model that cannot make a picture. Only shapes are computed (meta tensors), so no weight is read.

    Args:
        components: text encoder, image decoder and tokenizer.
        network: the UNet as a student.

    Raises:
        ComponentsError: a part fails, or its output has a wrong shape.
    """
    scale, shift = latent_scaling(components.vae)
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in (scale, shift)) or scale == 0:
        raise ComponentsError(f"the VAE's scaling_factor and shift_factor are {scale!r:.40} and {shift!r:.40}")
    geometry = components.geometry
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            unet = network.unet
            text = _text(components)
            latents = torch.zeros(1, *geometry.latent_shape, dtype=unet.dtype, device=unet.device)
            made = network(latents, text.to(unet.device, unet.dtype))
            vae = components.vae
            image = decode_latents(vae, made.to(vae.device, vae.dtype))
    except Exception as error:  # Libraries raise anything for configurations that make no sense.
        raise ComponentsError(f"the model does not run: {one_line(repr(error))}") from error
    pixels = geometry.pixels_per_latent
    expected = (1, 3, pixels * geometry.height, pixels * geometry.width)
    if tuple(image.shape) != expected:
        raise ComponentsError(f"the model makes pictures of shape {tuple(image.shape)}: expected {expected}")


def _text(components: Components) -> torch.Tensor:
    """Return text embeddings (1, L, D) on the meta device."""
    try:
        return encode_text(components, [""])
    except DataDependentOutputException:  # BERT reads its mask to choose a kernel.
        length, width = components.tokenizer.model_max_length, components.unet.config["cross_attention_dim"]
        return torch.zeros(1, length, width)
