"""Tiny models, built in-process from a fixed seed, one for each kind of model the project must take."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from tiue.components import Components

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}


def unet(**changes: Any) -> UNet2DConditionModel:
    """Two levels, one layer each; SD 1.5's kind of projections and heads."""
    options = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "use_linear_projection": False,
        "cross_attention_dim": 16,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**(options | changes)).eval()


def sd15() -> Components:
    """Like SD 1.5."""
    return _components("tiny-sd15", unet(), _clip(), _vae(4), _tokenizer(length=20))


def v_prediction() -> Components:
    """Like SD 2.1 at 768 pixels (v-prediction, linear projections, heads per level), with a TAESD autoencoder."""
    model = unet(use_linear_projection=True, attention_head_dim=(2, 4))
    scheduler = SCHEDULER | {"prediction_type": "v_prediction"}
    return _components("tiny-v", model, _clip(), taesd(), _tokenizer(length=20), scheduler)


def emoji() -> Components:
    """Like the default model: a BERT with its mask, 16 latent channels, attention at both levels."""
    model = unet(
        in_channels=16,
        out_channels=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        use_attention_mask=True,
    )
    return _components("tiny-emoji", model, BertModel(config), _vae(16), _tokenizer(length=32))


def v_teacher() -> Components:
    """Like the default model's teacher: `emoji`, but it predicts v and starts from pure noise."""
    made = emoji()
    own = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return replace(made, scheduler_config=made.scheduler_config | own)


def with_unet(unet: UNet2DConditionModel) -> Components:
    """`sd15` around another UNet."""
    return replace(sd15(), unet=unet)


def one_level_unet(**changes: Any) -> UNet2DConditionModel:
    """Like `unet`, without its second level: traced sooner, for tests that need no change of resolution."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return unet(**{"block_out_channels": (16,)} | blocks | changes)


def small() -> Components:
    """The model that is traced soonest."""
    return replace(with_unet(one_level_unet()), vae=taesd())


def save_safety_checker(directory: Path, **processor: Any) -> StableDiffusionSafetyChecker:
    """Add a safety checker, which flags some pictures, and its feature extractor to a pipeline directory."""
    torch.manual_seed(3)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 4,
    }
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config={"num_hidden_layers": 2}, projection_dim=8)
    ).eval()
    for embeds in (checker.concept_embeds, checker.special_care_embeds):
        embeds.copy_(torch.randn_like(embeds))
    checker.concept_embeds_weights.fill_(0.45)
    checker.special_care_embeds_weights.fill_(0.3)
    checker.save_pretrained(directory / "safety_checker")
    options = {"size": {"shortest_edge": 14}, "crop_size": {"height": 12, "width": 12}}
    CLIPImageProcessor(**(options | processor)).save_pretrained(directory / "feature_extractor")
    edit_json(
        directory / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    return checker


def upscaler() -> dict[str, torch.Tensor]:
    """Return the weights of a tiny RealESRGAN Compact (SRVGGNetCompact), which enlarges by 2."""
    torch.manual_seed(4)
    tensors: dict[str, torch.Tensor] = {}
    for i, (channels, out) in enumerate(((3, 4), (4, 4), (4, 12))):
        tensors |= {
            f"body.{2 * i}.weight": 0.2 * torch.randn(out, channels, 3, 3),
            f"body.{2 * i}.bias": torch.randn(out),
        }
    return tensors | {f"body.{i}.weight": torch.rand(4) for i in (1, 3)}


def save_pipeline(components: Components, directory: Path) -> Path:
    """Write a diffusers pipeline directory."""
    parts = {"unet": components.unet, "vae": components.vae, "text_encoder": components.text_encoder}
    for name, part in parts.items():
        part.save_pretrained(directory / name)
    components.tokenizer.save_pretrained(directory / "tokenizer")
    DDIMScheduler.from_config(components.scheduler_config).save_pretrained(directory / "scheduler")
    index: dict[str, Any] = {
        name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()
    }
    index |= {
        "_class_name": "StableDiffusionPipeline",
        "tokenizer": ["transformers", "PreTrainedTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


# What the configurations in runwayml/stable-diffusion-v1-5 hold, written by diffusers 0.6.
_SD15_UNET = set(
    """_class_name act_fn attention_head_dim block_out_channels center_input_sample cross_attention_dim
    down_block_types downsample_padding flip_sin_to_cos freq_shift in_channels layers_per_block mid_block_scale_factor
    norm_eps norm_num_groups out_channels sample_size up_block_types""".split()  # noqa: SIM905 (for reading)
)
_SD15_VAE = set(
    """_class_name act_fn block_out_channels down_block_types in_channels latent_channels layers_per_block
    norm_num_groups out_channels sample_size up_block_types""".split()  # noqa: SIM905
)
_SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def save_original_sd15(directory: Path) -> Components:
    """Write a pipeline directory with all that is old about SD 1.5's, in float16; returns what was written."""
    parts = _components("tiny-original", unet(attention_head_dim=8), _clip(vocab_size=520), _vae(4), _tokenizer(20))
    save_pipeline(parts, directory)
    edit_json(directory / "unet" / "config.json", only=_SD15_UNET)
    edit_json(directory / "vae" / "config.json", only=_SD15_VAE)
    edit_json(directory / "text_encoder" / "config.json", torch_dtype="float16", dropout=0.0)
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(_SD15_SCHEDULER))
    save_clip_tokenizer(directory / "tokenizer", pad="<|endoftext|>")
    edit_json(
        directory / "model_index.json",
        _class_name="StableDiffusionPipeline",
        _diffusers_version="0.6.0",
        tokenizer=["transformers", "CLIPTokenizer"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    for path in directory.rglob("*.safetensors"):
        tensors = {_sd15_name(path.parent.name, name): t.half() for name, t in load_file(path).items()}
        if path.parent.name == "text_encoder":
            tensors["text_model.embeddings.position_ids"] = torch.arange(24)[None]
        save_file(tensors, path, {"format": "pt"})
    return parts


def save_clip_tokenizer(directory: Path, pad: str, settings: bool = True) -> None:
    """Write the files of the slow CLIPTokenizer, as Stable Diffusion has them; without `settings` only its words."""
    for path in directory.glob("*"):
        path.unlink()
    characters = list(bytes_to_unicode().values())
    merges = ["a t</w>", "c at</w>", "! !</w>"]
    tokens = [*characters, *(f"{c}</w>" for c in characters), *("".join(merge.split()) for merge in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    if settings:
        end, start = "<|endoftext|>", "<|startoftext|>"
        own = {"model_max_length": 20, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer", "pad_token": end}
        specials = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
        (directory / "tokenizer_config.json").write_text(json.dumps(own))
        (directory / "special_tokens_map.json").write_text(json.dumps(specials))


def edit_json(path: Path, only: Any = None, **changes: Any) -> None:
    """Change values of a JSON file, and keep `only` those of its own that are named."""
    content = {key: value for key, value in json.loads(path.read_text()).items() if only is None or key in only}
    path.write_text(json.dumps(content | changes))


def _sd15_name(part: str, name: str) -> str:
    """What diffusers called the attention of a VAE before 0.18."""
    if part != "vae" or ".attentions." not in name:
        return name
    for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
        name = name.replace(new, old)
    return name


def _components(
    name: str, unet: Any, text_encoder: Any, vae: Any, tokenizer: Any, scheduler: Any = SCHEDULER
) -> Components:
    return Components(unet, text_encoder.eval(), vae.eval(), tokenizer, dict(scheduler), name, "apache-2.0")


def _clip(vocab_size: int = 128) -> CLIPTextModel:
    torch.manual_seed(1)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _vae(latent_channels: int) -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
    )


def taesd(latent_channels: int = 4) -> AutoencoderTiny:
    """Small, and made for the latents of `sd15` unless told otherwise."""
    torch.manual_seed(2)
    return AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def _tokenizer(length: int) -> PreTrainedTokenizerFast:
    """One token per lower-case character, between a start and an end."""
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {token: i for i, token in enumerate([*specials, *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=length,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )


# Names of the original layout, which A1111's single files have, in the place of diffusers'.
_ORIGINAL_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ORIGINAL_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_ORIGINAL_VAE = {
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
}


def original_layout(components: Components) -> dict[str, torch.Tensor]:
    """Return the tensors of a model with a CLIP text encoder under the names of A1111's single files."""
    unet, vae = components.unet, components.vae
    tensors = {
        f"model.diffusion_model.{_original_unet_name(name, unet)}": tensor for name, tensor in unet.state_dict().items()
    }
    for name, tensor in vae.state_dict().items():
        linear = ".attentions." in name and name.endswith("weight") and tensor.ndim == 2
        tensors[f"first_stage_model.{_original_vae_name(name, vae)}"] = tensor[..., None, None] if linear else tensor
    for name, tensor in components.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.{name}"] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _original_unet_name(name: str, unet: Any) -> str:
    rows = unet.config.layers_per_block + 1
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name):
        side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * rows}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            place = 2 if getattr(unet.up_blocks[block], "attentions", None) else 1
            return f"output_blocks.{block * rows + rows - 1}.{place}.{rest}"
        place = 0 if kind == "resnets" else 1
        row = block * rows + layer
        start = f"input_blocks.{row + 1}" if side == "down" else f"output_blocks.{row}"
        return f"{start}.{place}.{_renamed(rest, _ORIGINAL_RESNET) if kind == 'resnets' else rest}"
    name = _renamed(name, _ORIGINAL_TOP)
    return name if ".1." in name and name.startswith("middle_block.1") else _renamed(name, _ORIGINAL_RESNET)


def _original_vae_name(name: str, vae: Any) -> str:
    levels = len(vae.config.block_out_channels)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
    return _renamed(name, _ORIGINAL_VAE)


def _renamed(name: str, names: dict[str, str]) -> str:
    for own, original in names.items():
        name = re.sub(rf"(^|\.){re.escape(own)}\.", rf"\g<1>{original}.", name)
    return name
