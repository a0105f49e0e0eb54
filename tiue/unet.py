"""The student: a diffusers UNet in two halves, an encoder run once and a decoder run at N timesteps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from tiue.schedule import Schedule

GUIDANCE_INPUT = "time_cond_proj_dim"  # of latent consistency models, which take the guidance scale as an input
# Options of UNet2DConditionModel that add inputs, and the values that turn them off.
_UNSUPPORTED_UNLESS = {
    "addition_embed_type": None,  # SDXL, Kandinsky
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    GUIDANCE_INPUT: None,
    "attention_type": "default",  # GLIGEN
    "center_input_sample": False,
}


class Features(NamedTuple):
    """The outputs of the encoder and inputs of the decoder."""

    mid: torch.Tensor  # output of the mid block, or of the encoder's last up block
    skips: tuple[torch.Tensor, ...]  # outputs of conv_in and the down blocks, in order, without those already used


class TiUE(nn.Module):
    """A time-independent unified encoder with a parallel decoder. It wraps a diffusers UNet.

    Args:
        unet: the network. It is not copied, and stays available as `unet`.
        schedule: the decoder's timesteps, and the weights of the sum of its predictions.
        encoder_timestep: the only timestep of the encoder, t_1 of the schedule of its training.
        shared_up_blocks: the number of up blocks, coarsest first, that belong to the encoder and run once. 0 in the
            paper.

    Raises:
        ValueError: the UNet has inputs other than latents, a timestep and text, or too few up blocks.
    """

    def __init__(
        self, unet: UNet2DConditionModel, schedule: Schedule, encoder_timestep: int, shared_up_blocks: int = 0
    ):
        super().__init__()
        if not isinstance(unet, UNet2DConditionModel):
            raise ValueError(f"expected a diffusers UNet2DConditionModel, got {type(unet).__name__}")
        check_supported(unet.config)
        check_shared_up_blocks(unet, shared_up_blocks)
        self.unet = unet
        self.schedule = schedule
        self.encoder_timestep = encoder_timestep
        self.shared_up_blocks = shared_up_blocks

    def forward(self, latents: torch.Tensor, text: torch.Tensor, schedule: Schedule | None = None) -> torch.Tensor:
        """Turn noise z_T (B, C, h, w) and text (B, L, D) into latents z_0 (B, C, h, w). schedule: None is its own."""
        return self.predict(latents, text, schedule)[0]

    def predict(
        self, latents: torch.Tensor, text: torch.Tensor, schedule: Schedule | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the same as `forward`, but return z_0 (B, C, h, w) and the predictions eps (N, B, C, h, w)."""
        schedule = schedule or self.schedule
        timesteps = torch.tensor(schedule.timesteps, device=latents.device)
        features = self.encode(latents, text)
        return self.sum(latents, self.decode(features, timesteps, text), schedule)

    def sum(self, latents: torch.Tensor, eps: torch.Tensor, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum noise z_T (B, C, h, w) and predictions (N*B, C, h, w) => z_0 (B, C, h, w), eps (N, B, C, h, w)."""
        eps = eps.unflatten(0, (len(schedule.timesteps), -1))
        eps = eps.to(latents.dtype)  # Autocast makes them half precision. The sum needs more.
        weights = torch.tensor(schedule.step_weights, device=latents.device, dtype=latents.dtype)
        # z_0 = w_0 z_T + sum_i w_i eps_i
        return schedule.noise_weight * latents + (weights.view(-1, 1, 1, 1, 1) * eps).sum(0), eps

    def encode(self, latents: torch.Tensor, text: torch.Tensor) -> Features:
        """Run conv_in, the down blocks, the mid block and shared up blocks at the encoder's timestep.

        Args:
            latents: noise z_T, (B, C, h, w).
            text: text embeddings, (B, L, D).
        """
        timesteps = torch.full(latents.shape[:1], self.encoder_timestep, device=latents.device)
        return self.encode_embedded(latents, self.embed(timesteps, latents.dtype), text)

    def decode(self, features: Features, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Run the up blocks and output layers at k timesteps at once.

        Args:
            features: from `encode`, for a batch of B.
            timesteps: int64 (k,).
            text: text embeddings, (B, L, D).

        Returns:
            eps (or v, if the UNet predicts v), (k*B, C, h, w), step-major: row = i*B + b.
        """
        temb = self.embed(timesteps.repeat_interleave(text.shape[0]), features.mid.dtype)
        return self.decode_embedded(features, temb, text)

    def embed(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Turn timesteps int64 (n,) into the embeddings (n, E) that the blocks take."""
        temb = self.unet.time_embedding(self.unet.time_proj(timesteps).to(dtype))
        return temb if self.unet.time_embed_act is None else self.unet.time_embed_act(temb)

    def encode_embedded(self, latents: torch.Tensor, temb: torch.Tensor | None, text: torch.Tensor) -> Features:
        """Do the same as `encode`, with a given time embedding (B, E). None: the UNet's biases hold it."""
        hidden = self.unet.conv_in(latents)
        skips = (hidden,)
        for block in self.unet.down_blocks:
            hidden, outputs = block(hidden_states=hidden, temb=temb, **_text_argument(block, text))
            skips += tuple(outputs)
        if self.unet.mid_block is not None:
            hidden = self.unet.mid_block(hidden, temb, **_text_argument(self.unet.mid_block, text))
        return self._up(Features(hidden, skips), slice(0, self.shared_up_blocks), temb, text)

    def decode_embedded(self, features: Features, temb: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Do the same as `decode`, with given time embeddings (k*B, E), step-major."""
        steps = temb.shape[0] // text.shape[0]
        features = features._replace(mid=repeat_rows(features.mid, steps))
        hidden, _ = self._up(features, slice(self.shared_up_blocks, None), temb, repeat_rows(text, steps), steps)
        if self.unet.conv_norm_out:
            hidden = self.unet.conv_act(self.unet.conv_norm_out(hidden))
        return self.unet.conv_out(hidden)

    def _up(
        self,
        features: Features,
        blocks: slice,
        temb: torch.Tensor | None,
        text: torch.Tensor,
        steps: int | None = None,
    ) -> Features:
        """Run some of the up blocks. Each removes its skips from `skips`, and repeats them for `steps` timesteps."""
        hidden, skips = features
        # Upsamplers double sizes. If downsampling rounded up an odd size, they need the exact size.
        rounded = any(size % 2**self.unet.num_upsamplers for size in skips[0].shape[2:])
        for block in self.unet.up_blocks[blocks]:
            count = len(block.resnets)
            skips, own = skips[:-count], skips[-count:]
            hidden = block(
                hidden_states=hidden,
                temb=temb,
                res_hidden_states_tuple=own if steps is None else tuple(repeat_rows(skip, steps) for skip in own),
                upsample_size=skips[-1].shape[2:] if rounded and skips else None,
                **_text_argument(block, text),
            )
        return Features(hidden, skips)


class Predictor(nn.Module):
    """The student during training. accelerate wraps this module."""

    def __init__(self, tiue: TiUE, share_encoder: bool):
        super().__init__()
        self.tiue, self._share_encoder = tiue, share_encoder

    def forward(self, latents: torch.Tensor, text: torch.Tensor, schedule: Schedule) -> torch.Tensor:
        """Turn noise z_T (B, C, h, w) and text (B, L, D) into predictions (N*B, C, h, w), step-major.

        The caller sums them, because FSDP may round the inputs of this module to half precision.
        """
        timesteps = torch.tensor(schedule.timesteps, device=latents.device)
        if self._share_encoder:
            return self.tiue.decode(self.tiue.encode(latents, text), timesteps, text)
        rows = timesteps.repeat_interleave(len(latents))
        return self.tiue.unet(repeat_rows(latents, len(timesteps)), rows, repeat_rows(text, len(timesteps))).sample


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a UNet that needs more inputs than latents, a timestep and text."""
    for option, expected in _UNSUPPORTED_UNLESS.items():
        value = config.get(option, expected)
        if value != expected:
            remedy = ": the exporter's `guidance` folds it in" if option == GUIDANCE_INPUT else ""
            raise ValueError(f"UNet option {option}={value!r} is not supported (expected {expected!r}){remedy}")
    inputs, outputs = config.get("in_channels", 4), config.get("out_channels", 4)  # diffusers' defaults
    if inputs != outputs:
        raise ValueError(
            f"the UNet has {inputs} input and {outputs} output channels: "
            "TiUE needs a text-to-image model, where they are equal"
        )


def check_shared_up_blocks(unet: UNet2DConditionModel, count: int) -> None:
    """Raise ValueError unless a decoder remains after `count` up blocks are shared."""
    blocks = len(unet.up_blocks)
    if not 0 <= count < blocks:
        raise ValueError(f"shared_up_blocks: expected 0 to {blocks - 1} for a UNet of {blocks} up blocks, got {count}")


def _text_argument(block: nn.Module, text: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


def repeat_rows(tensor: torch.Tensor, steps: int) -> torch.Tensor:
    """Repeat a tensor (B, ...) => (steps*B, ...), step-major."""
    return tensor.repeat(steps, *[1] * (tensor.ndim - 1))
