"""`python -m benchmarks.pipelines sd15 DIR`: Stable Diffusion pipelines of the true sizes, with random weights.

Configurations, parameter names, shapes and file layout are those of the published models. Memory, speed and loading can
therefore be measured and tested without the weights. Pictures from these pipelines are noise.

The tokenizer has CLIP's size (49408), length (77), special tokens, padding and order (bytes, bytes that end a word,
48894 merges). The merges are invented from letters, because CLIP's own vocabulary would be a download. Words take about
twice as many tokens as in CLIP. Every prompt is padded to 77, so no timing changes.

`emoji` is the 64-pixel student with its trained weights, as a diffusers pipeline.
"""

import argparse
import json
import logging
import os
import shutil
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_VOCABULARY_SIZE = 49408
_TEXT_LENGTH = 77

_SD_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
_SD_CLIP = {
    "vocab_size": _VOCABULARY_SIZE,
    "max_position_embeddings": _TEXT_LENGTH,
    # The published configurations have these ids, which are not the tokenizer's.
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
# The options of all three schedulers. Each scheduler ignores those of the others.
_SD_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_SCHEDULERS = {"pndm": "PNDMScheduler", "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}


@dataclass(frozen=True)
class Layout:
    """The differences of one family member from the others."""

    unet: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any]
    pad_token: str  # of the tokenizer
    scheduler: str  # a key of _SCHEDULERS, as in the published pipeline
    prediction_type: str = "epsilon"


_WIDTHS = (320, 640, 1280, 1280)
_SD15_UNET = {"block_out_channels": _WIDTHS, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
_SD21_UNET = {
    "block_out_channels": _WIDTHS,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "sample_size": 64,
}
_CLIP_L = {  # SD 1.x: CLIP ViT-L/14
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_CLIP_H = {  # SD 2.x: OpenCLIP ViT-H/14 without its last layer
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_KL = {"block_out_channels": (128, 256, 512, 512)}
_TINY_WIDTHS = (32, 64, 128, 128)
_TINY_CLIP = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_TINY_VAE = {"block_out_channels": (32, 32, 64, 64), "sample_size": 128}

_TINY21 = Layout(
    _SD21_UNET
    | {
        "block_out_channels": _TINY_WIDTHS,
        "attention_head_dim": (1, 2, 4, 4),
        "cross_attention_dim": 32,
        "sample_size": 16,
    },
    _CLIP_H | _TINY_CLIP | {"hidden_size": 32},
    _TINY_VAE,
    "!",
    "pndm",
)

LAYOUTS = {
    "sd15": Layout(_SD15_UNET, _CLIP_L, _KL | {"sample_size": 512}, _EOS, "pndm"),
    "sd21-base": Layout(_SD21_UNET, _CLIP_H, _KL | {"sample_size": 768}, "!", "pndm"),
    "sd21": Layout(
        _SD21_UNET | {"sample_size": 96, "upcast_attention": True},
        _CLIP_H,
        _KL | {"sample_size": 768},
        "!",
        "ddim",
        "v_prediction",
    ),
    "tiny": Layout(
        _SD15_UNET | {"block_out_channels": _TINY_WIDTHS, "cross_attention_dim": 32, "sample_size": 16},
        _CLIP_L | _TINY_CLIP | {"hidden_size": 32},
        _TINY_VAE,
        _EOS,
        "pndm",
    ),
    "tiny21": _TINY21,
    "mini21": replace(
        _TINY21,
        unet=_TINY21.unet
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "block_out_channels": (32, 64),
            "attention_head_dim": (1, 2),
        },
        vae={
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "block_out_channels": (32, 64),
            "sample_size": 32,
        },
    ),
}
EMOJI = Path(__file__).parents[1] / "models/emoji/student.safetensors"
PIPELINES = (*LAYOUTS, "emoji")
MODELS = (*PIPELINES, "taesd")
_CARD = """---
license: apache-2.0
---
# {model}, random weights

The configuration of {model} with random weights (seed {seed}) by `benchmarks.pipelines`, for measurements of speed and
memory. Its pictures are noise. It contains no weight of the published model.
"""


def write_pipeline(
    model: str,
    directory: str | Path,
    *,
    dtype: str = "fp32",
    max_shard_size: str | None = None,
    scheduler: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a diffusers pipeline directory. For "taesd", write the directory of an AutoencoderTiny alone.

    Parts are made and written one at a time. The largest takes 3.5 GB of memory. "emoji" is the shipped student, and
    takes no options.

    Args:
        model: one of MODELS.
        directory: must not exist. It appears when it is complete.
        dtype: of the stored weights, "fp32" or "fp16".
        max_shard_size: split larger parts into files of at most this size, for example "1GB". None: one file each.
        scheduler: "pndm", "ddim" or "ddpm". None: that of the published pipeline.
        seed: of every part's weights.

    Returns:
        The directory.

    Raises:
        ValueError: an argument has another value.
        FileExistsError: the directory exists.
    """
    _one_of("model", model, MODELS)
    _one_of("dtype", dtype, ("fp32", "fp16"))
    _one_of("scheduler", scheduler, (None, *_SCHEDULERS))
    if model == "emoji" and (dtype, max_shard_size, scheduler, seed) != ("fp32", None, None, 0):
        raise ValueError("emoji: expected no options, because its weights are not random")
    target = Path(directory).absolute()
    if target.exists():
        raise FileExistsError(f"{directory} exists; choose another")
    building = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        building.mkdir(parents=True)
        if model == "emoji":
            _write_emoji(building)
        else:
            (building / "README.md").write_text(_CARD.format(model=model, seed=seed), encoding="utf-8")
            _write_parts(model, building, dtype, {"max_shard_size": max_shard_size or "100GB"}, scheduler, seed)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def unet_configuration(model: str) -> dict[str, Any]:
    """Return the arguments of the UNet of a model of LAYOUTS."""
    return _SD_UNET | LAYOUTS[model].unet


def scheduler_configuration(model: str, scheduler: str | None = None) -> dict[str, Any]:
    """Return the scheduler's configuration of a model of LAYOUTS. `scheduler` is as in `write_pipeline`."""
    layout = LAYOUTS[model]
    name = {"_class_name": _SCHEDULERS[scheduler or layout.scheduler]}
    return name | _SD_SCHEDULER | {"prediction_type": layout.prediction_type}


def random_teacher(model: str, work: Path, changes: Mapping[str, Any]) -> Any:
    """Load a model, with a UNet of changed configuration and random weights, which are the same each time.

    Args:
        model: one of MODELS.
        work: where the pipeline is written, once.
        changes: to the UNet's configuration.

    Returns:
        `tiue.components.Components`.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from tiue.components import load_components

    if not (work / model).exists():
        write_pipeline(model, work / model)
    loaded = load_components(work / model)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(dict(loaded.unet.config) | changes).eval()
    return replace(loaded, unet=unet)


def _write_parts(
    model: str, directory: Path, dtype: str, saving: dict[str, str], scheduler: str | None, seed: int
) -> None:
    # At import, diffusers reports that optimum-onnx shares a namespace with optimum.
    logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel, __version__
    from transformers import CLIPTextConfig, CLIPTextModel

    def write(make: Any, path: Path) -> None:
        torch.manual_seed(seed)
        part = make().eval().requires_grad_(False)
        (part.half() if dtype == "fp16" else part).save_pretrained(path, safe_serialization=True, **saving)

    if model == "taesd":
        write(AutoencoderTiny, directory)  # The defaults of the class are TAESD.
        return
    layout = LAYOUTS[model]
    write(lambda: UNet2DConditionModel(**unet_configuration(model)), directory / "unet")
    config = CLIPTextConfig(**_SD_CLIP, **layout.text_encoder)
    write(lambda: CLIPTextModel(config), directory / "text_encoder")
    write(lambda: AutoencoderKL(**(_SD_VAE | layout.vae)), directory / "vae")
    _write_tokenizer(directory / "tokenizer", layout.pad_token)
    configuration = scheduler_configuration(model, scheduler)
    (directory / "scheduler").mkdir()
    _write_json(directory / "scheduler" / "scheduler_config.json", configuration | {"_diffusers_version": __version__})
    _write_json(
        directory / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": __version__,
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", configuration["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _write_emoji(directory: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from tiue.checkpoint import load_student

    parts = load_student(EMOJI).components
    (directory / "README.md").write_text(f"---\nlicense: {parts.license}\n---\n# {parts.name}\n", encoding="utf-8")
    StableDiffusionPipeline(
        parts.vae,
        parts.text_encoder,
        parts.tokenizer,
        parts.unet,
        DDIMScheduler.from_config(parts.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)


def _write_tokenizer(directory: Path, pad_token: str) -> None:
    """Write vocab.json, merges.txt, tokenizer.json and their configurations."""
    from transformers import CLIPTokenizerFast
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    symbols += [f"{symbol}</w>" for symbol in symbols]
    merges = list(islice(_merges(), _VOCABULARY_SIZE - len(symbols) - 2))
    tokens = [*symbols, *map("".join, merges), _BOS, _EOS]
    directory.mkdir()
    _write_json(directory / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizerFast(
        vocab_file=str(directory / "vocab.json"),
        merges_file=str(directory / "merges.txt"),
        unk_token=_EOS,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=pad_token,
        model_max_length=_TEXT_LENGTH,
    )
    tokenizer.save_pretrained(directory)


def _merges() -> Iterator[tuple[str, str]]:
    """Yield merges that make words of two letters, then three, then four; whole words come first."""
    letters = string.ascii_lowercase
    for length in (1, 2, 3):
        for end in ("</w>", ""):
            for *start, last in product(letters, repeat=length + 1):
                yield "".join(start), last + end


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(filter(None, allowed))}, got {value!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipelines",
        description="Write a Stable Diffusion pipeline of the true configuration with random weights.",
    )
    parser.add_argument(
        "model",
        choices=MODELS,
        help="tiny and tiny21: sd15 and sd21-base with narrow layers; mini21: two levels; emoji: the 64-pixel student",
    )
    parser.add_argument("directory", help="where to write; it must not exist")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="type of the stored weights")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="split larger parts into files of this size, for example 1GB"
    )
    parser.add_argument(
        "--scheduler",
        choices=_SCHEDULERS,
        help="class in the scheduler's configuration (default: that of the published pipeline)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    given = vars(parser.parse_args(argv))
    try:
        print(f"wrote {write_pipeline(given.pop('model'), given.pop('directory'), **given)}")
    except (ValueError, OSError) as error:
        print(f"benchmarks.pipelines: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
