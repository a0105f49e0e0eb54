"""Constants that belong in a network's weights: the scale of its input, and a guidance scale that is an input."""

import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel


def fold_input_scale(unet: UNet2DConditionModel, scale: float) -> None:
    """Change a UNet F, in place, to F(scale z). The bias of its first convolution stays."""
    with torch.no_grad():
        unet.conv_in.weight.mul_(scale)


def fold_guidance(unet: UNet2DConditionModel, guidance: float) -> None:
    """Turn the guidance scale of a latent consistency model from an input to a constant, in place.

    The time embedding starts with linear_1(emb(t) + cond_proj(emb(w))), w = guidance - 1 (arXiv 2310.04378). Since w is
    fixed, linear_1(cond_proj(emb(w))) joins the bias of linear_1.

    Raises:
        ValueError: the UNet takes no guidance scale.
    """
    size, embedding = unet.config.time_cond_proj_dim, unet.time_embedding
    if size is None:
        raise ValueError("`guidance`: the UNet takes no guidance scale as an input, so leave it out")
    with torch.no_grad():
        constant = embedding.cond_proj(embed_guidance(torch.tensor([guidance]), size))[0]
        embedding.linear_1.bias.add_(embedding.linear_1.weight @ constant)
    embedding.cond_proj = None
    unet.register_to_config(time_cond_proj_dim=None)


def embed_guidance(guidance: torch.Tensor, size: int) -> torch.Tensor:
    """Embed guidance scales (B,) as latent consistency models do, by w = guidance - 1: float32 (B, size)."""
    w = guidance.float().cpu() - 1
    # The method does not use the pipeline.
    embedded = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=size)
    return embedded.to(guidance.device)
