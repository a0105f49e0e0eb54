"""The student in two halves: all work that does not depend on the timestep is done once, exactly.

The input of a resnet in an up block is cat(hidden, skip). The following moves out of the decoder:

- Convolution is linear in its channels, so conv1 and the shortcut of `skip` are computed once and added to those of
  `hidden`. The group norm before conv1 works on groups of channels. Groups of only skip channels are normalized once.
  One group may mix channels of `hidden` and `skip`. Its skip channels are the edge, and stay in the decoder.
- The first resnet's `hidden` does not depend on the timestep, so its whole conv1 and shortcut are computed once.
- Keys and values of the text are computed once.
- Time embeddings of fixed timesteps are constants. They become biases of conv1, one per timestep.

conv_out is linear, so it is applied once, to the weighted sum of its inputs. Up blocks of other kinds stay whole.

The halves exchange features by name, `up_<block>_<name>`.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import zip_longest
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, nn

from tiue.unet import TiUE, repeat_rows

M = TypeVar("M", bound=nn.Module)
_KEYS_VALUES = "text_keys_values"


def hoist(tiue: TiUE, timesteps: Sequence[int]) -> tuple["HoistedEncoder", "HoistedDecoder"]:
    """Split a student into a half that runs once and a half that runs at every timestep.

    Both halves alias the student's weights, have no gradients, and compute in the UNet's own dtype.

    Args:
        tiue: the student. It is not changed.
        timesteps: the timesteps of the decoder. step_index i means timesteps[i].

    Returns:
        (encoder, decoder). The decoder takes the encoder's features, in the order of `encoder.names`.
    """
    with torch.no_grad():
        first = tiue.shared_up_blocks
        copy = TiUE(alias_weights(tiue.unet), tiue.schedule, tiue.encoder_timestep, first)
        unet = copy.unet
        temb = tiue.embed(torch.tensor(list(timesteps)), tiue.unet.dtype)
        hidden = 0  # number of channels that depend on the timestep
        once, per_step, names, text_columns = dict[str, Any](), dict[str, Any](), list[str](), _TextColumns()
        for i, block in enumerate(unet.up_blocks[first:], first):
            halves = _split(block, hidden, temb, text_columns) if _can_split(block) else _keep(block, hidden, temb)
            once[f"up_{i}_"] = halves.once
            per_step[f"up_{i}_"] = halves.per_step
            names += [f"up_{i}_{name}" for name in halves.once.names]
            hidden = halves.channels
        if text_columns.projections:
            names.append(_KEYS_VALUES)
        decoder = HoistedDecoder(unet, per_step, names)
        unet.up_blocks = unet.up_blocks[:first]
        unet.conv_norm_out = unet.conv_out = None
        encoder = HoistedEncoder(copy, once, names, text_columns.projections)
    return encoder.eval(), decoder.eval()


class HoistedEncoder(nn.Module):
    """The half that runs once."""

    def __init__(
        self, tiue: TiUE, blocks: Mapping[str, nn.Module], names: Sequence[str], projections: Sequence[nn.Module]
    ):
        super().__init__()
        self.names = tuple(names)  # names of the features, in their order
        temb = tiue.embed(torch.tensor([tiue.encoder_timestep]), tiue.unet.dtype)
        self.register_buffer("temb", None if _fold_time(tiue.unet, temb) else temb)
        self.tiue = tiue
        self.prefixes = tuple(blocks)  # of the names of each block's features
        self.blocks = nn.ModuleList(blocks.values())
        self.projections = nn.ModuleList(projections)

    def forward(self, latents: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """Turn latents (B, C, h, w), text (B, L, D) into features: maps (B, C, h, w), keys and values (B, L, K)."""
        temb = None if self.temb is None else self.temb.expand(latents.shape[0], -1)
        hidden, skips = self.tiue.encode_embedded(latents, temb, text)
        features: dict[str, Tensor] = {}
        for prefix, block in zip(self.prefixes, self.blocks, strict=True):
            skips, own = skips[: -block.skips], skips[-block.skips :]
            features |= _prefixed(prefix, block(hidden, own[::-1], text))
            hidden = None  # The next block's depends on the timestep.
        if self.projections:
            features[_KEYS_VALUES] = torch.cat([project(text) for project in self.projections], dim=-1)
        return tuple(features[name] for name in self.names)


class HoistedDecoder(nn.Module):
    """The half that runs at every timestep."""

    def __init__(self, unet: Any, blocks: Mapping[str, nn.Module], names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)  # names of the features, in their order
        self.prefixes = tuple(blocks)  # of the names of each block's features
        self.blocks = nn.ModuleList(blocks.values())
        self.norm_out = nn.Sequential(unet.conv_norm_out, unet.conv_act) if unet.conv_norm_out else nn.Identity()
        self.weighted_sum = _WeightedSum(unet.conv_out)

    def forward(self, features: Sequence[Tensor], step_index: Tensor, step_weight: Tensor) -> Tensor:
        """Turn features, step_index int64 (k,) and step_weight (k,) into sum_k step_weight_k eps_k (B, C, h, w)."""
        k, batch = step_index.shape[0], features[0].shape[0]
        named = dict(zip(self.names, features, strict=True))
        text = repeat_rows(named[_KEYS_VALUES], k) if _KEYS_VALUES in named else None
        hidden = None
        for prefix, block in zip(self.prefixes, self.blocks, strict=True):
            hidden = block(hidden, _own(named, prefix), step_index, text)
        assert hidden is not None  # A UNet has up blocks.
        return self.weighted_sum(self.norm_out(hidden).unflatten(0, (k, batch)), step_weight)


class _WeightedSum(nn.Module):
    """conv_out of the weighted sum of its inputs, in conv_out's dtype. conv_out is linear, so it is applied once."""

    def __init__(self, conv_out: nn.Conv2d):
        super().__init__()
        self.conv = _conv_of(conv_out, slice(0, conv_out.in_channels), bias=False)
        self.register_buffer("bias", conv_out.bias.detach()[:, None, None])

    def forward(self, x: Tensor, step_weight: Tensor) -> Tensor:
        """Turn x (k, B, C, h, w) and step_weight (k,) into the sum (B, C, h, w)."""
        weight = step_weight.to(self.bias.dtype)
        summed = (weight[:, None, None, None, None] * x.to(self.bias.dtype)).sum(0)
        return self.conv(summed) + self.bias * weight.sum()


def alias_weights(module: M) -> M:
    """Copy a module. Its structure may be changed. Its weights alias the original's, so they take no memory."""
    tensors = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return deepcopy(module, tensors | {id(b): b.detach() for b in module.buffers()})


class _Halves(NamedTuple):
    """An up block in two halves."""

    once: Any  # (hidden or None, the block's skips, text) => features by name; `once.names` lists the names
    per_step: nn.Module  # (hidden or None, features by name, step_index, keys and values of the text) => hidden
    channels: int  # of the block's output


class _TextColumns:
    """The linear layers that are applied to the text once. Their results stand side by side, as columns of a tensor."""

    def __init__(self) -> None:
        self.projections: list[nn.Module] = []
        self._width = 0

    def move(self, attention: Any) -> None:
        """Move an attention's layers for keys and values here. In their place, put layers that select their columns."""
        for name in ("to_k", "to_v"):
            project = getattr(attention, name)
            setattr(attention, name, _Columns(self._width, self._width + project.out_features))
            self.projections.append(project)
            self._width += project.out_features


class _Columns(nn.Module):
    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.start : self.stop]


def _can_split(block: nn.Module) -> bool:
    if type(block) not in (UpBlock2D, CrossAttnUpBlock2D) or all(getattr(block, s, None) for s in ("s1", "s2", "b1")):
        return False  # Another kind of block, or FreeU, which changes the inputs of resnets.
    resnets = all(
        type(resnet) is ResnetBlock2D
        and resnet.time_embedding_norm in ("default", "scale_shift")
        and resnet.upsample is None
        and resnet.downsample is None
        for resnet in block.resnets
    )
    return resnets and all(
        type(attention) is Transformer2DModel
        and not any(a.norm_cross or a.fused_projections for a in _of_text(attention))
        for attention in getattr(block, "attentions", ())
    )


def _of_text(module: nn.Module) -> list[Any]:
    """List the attentions to the text (cross-attentions)."""
    layers = [m for m in module.modules() if isinstance(m, BasicTransformerBlock)]
    return [a for m in layers for a in ((m.attn1,) if m.only_cross_attention else ()) + (m.attn2,) if a is not None]


def _split(block: Any, hidden: int, temb: Tensor, text: _TextColumns) -> _Halves:
    for attention in _of_text(block):
        text.move(attention)
    once, per_step = list[_ResnetOnce](), list[_ResnetPerStep]()
    for resnet in block.resnets:
        once.append(_ResnetOnce(resnet, hidden))
        per_step.append(_ResnetPerStep(resnet, hidden, temb))
        hidden = resnet.out_channels
    return _Halves(_SplitOnce(once), _SplitPerStep(block, per_step), hidden)


def _prefixed(prefix: str, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": feature for name, feature in features.items()}


def _own(features: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the features whose names begin with `prefix`, under names without the prefix."""
    return {name.removeprefix(prefix): feature for name, feature in features.items() if name.startswith(prefix)}


class _SplitOnce(nn.Module):
    def __init__(self, resnets: Sequence["_ResnetOnce"]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.skips = len(resnets)
        self.names = [f"{i}_{name}" for i, resnet in enumerate(resnets) for name in resnet.names]

    def forward(self, hidden: Tensor | None, skips: Sequence[Tensor], text: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            features |= _prefixed(f"{i}_", resnet(skip if hidden is None else torch.cat([hidden, skip], dim=1)))
            hidden = None
        return features


class _SplitPerStep(nn.Module):
    def __init__(self, block: Any, resnets: Sequence[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = getattr(block, "attentions", ())
        self.upsamplers = block.upsamplers or ()

    def forward(
        self, hidden: Tensor | None, features: Mapping[str, Tensor], step_index: Tensor, text: Tensor | None
    ) -> Tensor:
        for i, (resnet, attention) in enumerate(zip_longest(self.resnets, self.attentions)):
            hidden = resnet(hidden, _own(features, f"{i}_"), step_index)
            if attention is not None:
                hidden = attention(hidden, encoder_hidden_states=text, return_dict=False)[0]
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden)
        assert hidden is not None  # A block has resnets.
        return hidden


def _edge(resnet: Any, hidden: int) -> int:
    """Return the number of skip's channels that are in a group with channels of `hidden`."""
    size = resnet.in_channels // resnet.norm1.num_groups
    return min(-hidden % size, resnet.in_channels - hidden)


class _ResnetOnce(nn.Module):
    """The part of a resnet that works on `skip`, the last input channels. These do not depend on the timestep."""

    def __init__(self, resnet: Any, hidden: int):
        """Make the part. hidden: the number of the input's first channels, which depend on the timestep."""
        super().__init__()
        self.edge = _edge(resnet, hidden)
        alone = slice(hidden + self.edge, resnet.in_channels)
        self.conv1 = None
        if alone.start < alone.stop:
            norm, conv1 = _norm_of(resnet.norm1, alone), _conv_of(resnet.conv1, alone, bias=False)
            self.conv1 = nn.Sequential(norm, resnet.nonlinearity, conv1)
        self.shortcut = _conv_of(_shortcut(resnet), slice(hidden, resnet.in_channels), bias=True)
        self.names = ["shortcut", *(["conv1"] if self.conv1 else []), *(["edge"] if self.edge else [])]

    def forward(self, skip: Tensor) -> dict[str, Tensor]:
        features = {"shortcut": self.shortcut(skip)}
        if self.conv1 is not None:
            features["conv1"] = self.conv1(skip[:, self.edge :])
        if self.edge:
            features["edge"] = skip[:, : self.edge]
        return features


class _ResnetPerStep(nn.Module):
    """The rest of a resnet."""

    def __init__(self, resnet: Any, hidden: int, temb: Tensor):
        """Make the rest. hidden: as in `_ResnetOnce`. temb: the embeddings (T, E) of the timesteps."""
        super().__init__()
        edge = _edge(resnet, hidden)
        self.conv1 = self.shortcut = None
        if hidden:
            mixed = slice(0, hidden + edge)
            norm, conv1 = _norm_of(resnet.norm1, mixed), _conv_of(resnet.conv1, mixed, bias=False)
            self.conv1 = nn.Sequential(norm, resnet.nonlinearity, conv1)
            self.shortcut = _conv_of(_shortcut(resnet), slice(0, hidden), bias=False)
        bias, scale = _time_bias(resnet, temb)
        self.register_buffer("bias", bias)
        self.register_buffer("scale", scale)
        self.norm2 = resnet.norm2
        self.out = nn.Sequential(resnet.nonlinearity, resnet.conv2)
        self.output_scale_factor = resnet.output_scale_factor

    def forward(self, hidden: Tensor | None, features: Mapping[str, Tensor], step_index: Tensor) -> Tensor:
        k = step_index.shape[0]
        shortcut = repeat_rows(features["shortcut"], k)
        x = repeat_rows(features["conv1"], k) if "conv1" in features else None
        if self.conv1 is not None and self.shortcut is not None and hidden is not None:
            shortcut = self.shortcut(hidden) + shortcut
            edge = [repeat_rows(features["edge"], k)] if "edge" in features else []
            mixed = self.conv1(torch.cat([hidden, *edge], dim=1))
            x = mixed if x is None else mixed + x
        assert x is not None  # At least one of the two parts has channels.
        batch = x.shape[0] // k
        bias = _rows(self.bias, step_index, batch)
        if self.scale is None:
            x = self.norm2(x + bias)
        else:
            first, (scale, shift) = bias, _rows(self.scale, step_index, batch).chunk(2, dim=1)
            x = self.norm2(x + first) * (1 + scale) + shift
        return (shortcut + self.out(x)) / self.output_scale_factor


def _rows(table: Tensor, step_index: Tensor, batch: int) -> Tensor:
    """Select rows of a table (T, C) and repeat each for a batch => (k*batch, C, 1, 1), step-major."""
    k = step_index.shape[0]
    return table[step_index][:, None].expand(k, batch, -1).flatten(0, 1)[:, :, None, None]


def _time_bias(resnet: Any, temb: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the bias of conv1 at each timestep (T, C), and the second norm's scale and shift (T, 2C) or None."""
    bias = resnet.conv1.bias.detach().expand(len(temb), -1)
    if resnet.time_emb_proj is None:
        return bias, None
    time = resnet.time_emb_proj(temb if resnet.skip_time_act else resnet.nonlinearity(temb))
    return (bias, time) if resnet.time_embedding_norm == "scale_shift" else (bias + time, None)


def _fold_time(unet: Any, temb: Tensor) -> bool:
    """Move a fixed time embedding (1, E) into biases, in place. Return False if a block uses it in another way."""
    resnets = [m for m in unet.modules() if hasattr(m, "time_emb_proj")]
    if any(type(m) is not ResnetBlock2D or m.time_embedding_norm != "default" for m in resnets):
        return False
    for resnet in resnets:
        bias, _ = _time_bias(resnet, temb)
        resnet.conv1.bias = nn.Parameter(bias[0], requires_grad=False)
        resnet.time_emb_proj = None
    return True


def _keep(block: Any, hidden: int, temb: Tensor) -> _Halves:
    """Keep a block of another kind whole. It runs at every timestep."""
    has_text = bool(getattr(block, "has_cross_attention", False))
    once = _WholeOnce(len(block.resnets), first=not hidden, has_text=has_text)
    return _Halves(once, _WholePerStep(block, temb), block.resnets[-1].out_channels)


class _WholeOnce(nn.Module):
    def __init__(self, skips: int, first: bool, has_text: bool):
        super().__init__()
        self.skips = skips
        self.names = [*(["hidden"] if first else []), *_skip_names(skips), *(["text"] if has_text else [])]

    def forward(self, hidden: Tensor | None, skips: Sequence[Tensor], text: Tensor) -> dict[str, Tensor]:
        features = dict(zip(_skip_names(self.skips), skips, strict=True)) | {"hidden": hidden, "text": text}
        return {name: features[name] for name in self.names}


class _WholePerStep(nn.Module):
    def __init__(self, block: Any, temb: Tensor):
        super().__init__()
        self.block = block
        self.register_buffer("temb", temb)

    def forward(
        self, hidden: Tensor | None, features: Mapping[str, Tensor], step_index: Tensor, _: Tensor | None
    ) -> Tensor:
        k = step_index.shape[0]
        if "hidden" in features:
            hidden = repeat_rows(features["hidden"], k)
        assert hidden is not None  # The block before has made it.
        skips = [repeat_rows(features[name], k) for name in _skip_names(len(self.block.resnets))]
        temb = _rows(self.temb, step_index, hidden.shape[0] // k)[:, :, 0, 0]
        text = {"encoder_hidden_states": repeat_rows(features["text"], k)} if "text" in features else {}
        return self.block(hidden, tuple(skips[::-1]), temb=temb, **text)


def _skip_names(count: int) -> list[str]:
    return [f"{i}_skip" for i in range(count)]


def _shortcut(resnet: Any) -> Any:
    """Return the shortcut of a resnet as a convolution. Without a shortcut, it is the identity."""
    if resnet.conv_shortcut is not None:
        return resnet.conv_shortcut
    count, weight = resnet.in_channels, resnet.conv1.weight
    identity = nn.Conv2d(count, count, 1, bias=False, device="meta")
    identity.weight = nn.Parameter(torch.eye(count, dtype=weight.dtype)[:, :, None, None], requires_grad=False)
    return identity


def _norm_of(norm: nn.GroupNorm, channels: slice) -> nn.GroupNorm:
    """Return the norm of some of the channels. They must be whole groups."""
    count = channels.stop - channels.start
    part = nn.GroupNorm(count * norm.num_groups // norm.num_channels, count, norm.eps, device="meta")
    part.weight = nn.Parameter(norm.weight[channels].detach(), requires_grad=False)
    part.bias = nn.Parameter(norm.bias[channels].detach(), requires_grad=False)
    return part


def _conv_of(conv: nn.Conv2d, channels: slice, *, bias: bool) -> nn.Conv2d:
    """Return the convolution restricted to some of the input's channels."""
    part = nn.Conv2d(
        channels.stop - channels.start,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        bias=bias and conv.bias is not None,
        device="meta",
    )
    part.weight = nn.Parameter(conv.weight[:, channels].detach(), requires_grad=False)
    if part.bias is not None and conv.bias is not None:
        part.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return part
