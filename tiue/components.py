"""The parts of a text-to-image model, its geometry, and reading it from a diffusers pipeline directory."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from tiue import hub
from tiue.files import is_directory, is_file
from tiue.loading import load_fast_tokenizer, load_part, load_single_file, load_unet_file, single_file_parts
from tiue.pipeline_directory import (
    CONFIGURATIONS,
    WITH_WEIGHTS,
    ComponentsError,
    PipelineDirectory,
    check_not_quantized,
    class_named,
    read_directory,
    read_json,
)
from tiue.recognize import not_safetensors
from tiue.safety_checker import PART as SAFETY_CHECKER
from tiue.safety_checker import SafetyChecker, read_safety_checker
from tiue.schedule import NoiseSchedule
from tiue.weights import WeightsError, choose_weights

__all__ = [
    "Components",
    "ComponentsError",
    "Geometry",
    "check_fit",
    "class_named",
    "decode_latents",
    "latent_scaling",
    "load_components",
    "load_safety_checker",
    "load_tiny_vae",
    "read_configs",
]


_LARGEST_SIDE = 2**16  # of latents


@dataclass(frozen=True)
class Geometry:
    """The shapes of a model's latents and pictures."""

    channels: int  # C, of latents
    height: int  # h of the model's default size, in latents
    width: int  # w of the model's default size, in latents
    pixels_per_latent: int
    multiple: int  # sides of pictures are multiples of this, in pixels

    @classmethod
    def from_configs(cls, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> "Geometry":
        """Read the geometry from the configurations of a UNet and a VAE.

        Raises:
            ComponentsError: the UNet's configuration has no default size, or one that is none.
        """
        size = unet.get("sample_size")
        if size is None:
            raise ComponentsError("the UNet's configuration has no sample_size, so there is no default image size")
        sides = [*size] if isinstance(size, list | tuple) else [size, size]
        if len(sides) != 2 or not all(type(side) is int and 1 <= side <= _LARGEST_SIDE for side in sides):
            raise ComponentsError(f"the UNet's sample_size is {size!r:.100}: expected a whole number, or two")
        height, width = sides
        pixels = 2 ** (len(vae["block_out_channels"]) - 1)
        halvings = len(unet["block_out_channels"]) - 1  # how often the UNet halves a side
        return cls(unet["in_channels"], height, width, pixels, pixels * 2**halvings)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the model's default size."""
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class Components:
    """The parts of a text-to-image model. Loaded modules are in evaluation mode, in float32 and on the CPU."""

    unet: UNet2DConditionModel
    text_encoder: PreTrainedModel  # CLIPTextModel, BertModel ...: its first output is the text (B, L, D)
    vae: AutoencoderKL | AutoencoderTiny
    tokenizer: PreTrainedTokenizerFast
    scheduler_config: dict[str, Any]
    name: str
    license: str
    safety_checker: SafetyChecker | None = None  # only for an export

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise process that `scheduler_config` describes. Raises ValueError as `NoiseSchedule.from_config`."""
        return NoiseSchedule.from_config(self.scheduler_config)

    @property
    def geometry(self) -> Geometry:
        """The shapes of latents and pictures. Raises ComponentsError as `Geometry.from_configs`."""
        return Geometry.from_configs(self.unet.config, self.vae.config)


def latent_scaling(vae: AutoencoderKL | AutoencoderTiny) -> tuple[float, float]:
    """Return (scale, shift) of a VAE. Its own latents are z / scale + shift, where z are the UNet's."""
    return vae.config["scaling_factor"], vae.config.get("shift_factor") or 0.0


def decode_latents(vae: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """Decode the UNet's latents (B, C, h, w) => image (B, 3, H, W) in [-1, 1]."""
    scale, shift = latent_scaling(vae)
    return vae.decode(latents / scale + shift, return_dict=False)[0]


def check_fit(components: Components) -> None:
    """Raise ComponentsError if the parts do not fit each other, or need something that a bundle cannot express."""
    unet, vae, text = components.unet.config, components.vae.config, components.text_encoder.config
    channels, latent_channels = unet["in_channels"], vae["latent_channels"]
    if channels != latent_channels:
        raise ComponentsError(f"the UNet has {channels} latent channels but the VAE {latent_channels}")
    if unet["cross_attention_dim"] != text.hidden_size:
        raise ComponentsError(
            f"the UNet expects text embeddings of {unet['cross_attention_dim']} but the text encoder "
            f"makes {text.hidden_size}"
        )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise ComponentsError("a VAE with latents_mean or latents_std is not supported")
    length = components.tokenizer.model_max_length
    if type(length) is not int or length < 1:
        raise ComponentsError(f"the tokenizer's model_max_length is {length!r:.100}: expected a whole number")
    limit = getattr(text, "max_position_embeddings", None)  # T5 has no limit
    if limit is not None and length > limit:
        raise ComponentsError(f"the tokenizer's model_max_length is {length}, the text encoder takes at most {limit}")
    if length >= VERY_LARGE_INTEGER:
        raise ComponentsError("the tokenizer has no model_max_length, so there is no length to pad prompts to")
    _ = components.geometry


def load_components(
    directory: str | Path,
    *,
    local_files_only: bool = True,
    unet_file: str | Path | None = None,
    guided: bool = False,
    safety_checker: bool = False,
) -> Components:
    """Load a diffusers pipeline directory. Weights are read from safetensors only, never from pickles.

    Each part's weights may be one file or shards, of any precision. The variant "fp16" is read if a part has no other.
    Memory holds the weights once, as float32. The tokenizer may be stored in the files of the slow or the fast class.
    Configurations of 2022 are repaired as in diffusers' StableDiffusionPipeline, with a warning. Prefixes that compiled
    or wrapped models add to names are removed, with a warning.

    Args:
        directory: holds model_index.json and unet/, text_encoder/, vae/, tokenizer/ and scheduler/.
        local_files_only: if False and there is no such directory, the name is a Hugging Face Hub id to download.
        unet_file: a safetensors file whose weights replace the pipeline's. It holds a UNet under diffusers' names, or
            is a single file in the original layout (A1111's), whose parts are all used. The model is named after the
            file. Folders of replaced parts need only a config.json.
        guided: accept a UNet that takes a guidance scale as an input. The caller must fold it: see `tiue.fold`.
        safety_checker: whether to load the pipeline's safety checker, if it has one. Otherwise a warning says that it
            is left out.

    Returns:
        The model.

    Raises:
        ComponentsError: a part is missing, unreadable or of an unsupported class. The message names it.
    """
    taken: set[str] = set()
    if unet_file is not None:
        original = single_file_parts(Path(unet_file))
        taken = original or {"unet"}
    wanted = [part for part in WITH_WEIGHTS if part not in taken]
    found = _find(directory, local_files_only, [*wanted, SAFETY_CHECKER] if safety_checker else wanted, guided)
    for message in found.warnings:
        warnings.warn(message, stacklevel=2)
    if found.safety_checker and not safety_checker:
        warnings.warn(f"{found.root}: safety_checker is left out: pictures are not checked", stacklevel=2)
    checker = read_safety_checker(found) if safety_checker else None
    tokenizer = load_fast_tokenizer(found)
    modules: dict[str, Any] = {}
    if unet_file is not None:
        path = Path(unet_file)
        modules = load_single_file(path, found, original) if original else {"unet": load_unet_file(path, found)}
    for part in WITH_WEIGHTS:
        if part not in modules:
            modules[part] = load_part(found.classes[part], found.root / part, part)
    size = found.configs["unet"].get("sample_size")
    if modules["unet"].config.sample_size != size:  # The size was repaired.
        modules["unet"].register_to_config(sample_size=size)
    return Components(
        **modules,
        tokenizer=tokenizer,
        scheduler_config=found.configs["scheduler"],
        name=Path(directory).resolve().name if unet_file is None else Path(unet_file).stem,
        license=found.license if unet_file is None else "unknown",  # The base's license need not be the UNet's.
        safety_checker=checker,
    )


def read_configs(directory: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the UNet's and the scheduler's configuration of a pipeline directory. Raises ComponentsError."""
    configs = _find(directory, True, []).configs
    return configs["unet"], configs["scheduler"]


def load_safety_checker(directory: str | Path, *, local_files_only: bool = True) -> SafetyChecker:
    """Load the safety checker of a pipeline directory, or Hub id. Raises ComponentsError, also if it has none."""
    found = read_safety_checker(_find(directory, local_files_only, [SAFETY_CHECKER]))
    if found is None:
        raise ComponentsError(f"{directory} has no safety checker")
    return found


def load_tiny_vae(directory: str | Path) -> AutoencoderTiny:
    """Load an AutoencoderTiny (TAESD's layout) from its own directory. Raises ComponentsError."""
    root = Path(directory)
    if not is_directory(root):
        raise ComponentsError(f"no such directory: {directory}")
    config = read_json(root, "config.json")
    check_not_quantized(root, config)
    class_named(diffusers, config.get("_class_name"), AutoencoderTiny)
    return load_part(AutoencoderTiny, root, "vae")


def _find(directory: str | Path, local_files_only: bool, parts: list[str], guided: bool = False) -> PipelineDirectory:
    """Read the configurations of a pipeline. If it is downloaded, fetch the weights of `parts` as well."""
    root = Path(directory)
    if is_directory(root):
        return read_directory(root, guided=guided)
    if is_file(root):
        what = "a file" if root.suffix == ".safetensors" else f"a file that {not_safetensors(root)}"
        raise ComponentsError(f"{directory} is {what}: expected a diffusers pipeline directory")
    if local_files_only or not hub.is_hub_id(str(directory)):
        raise ComponentsError(f"no such pipeline directory: {directory}")
    return _download(str(directory), parts, guided)


def _download(hub_id: str, parts: list[str], guided: bool) -> PipelineDirectory:
    """Fetch a Hub model's snapshot, with the weights of `parts` in one form each. Raises ComponentsError."""
    try:
        if hub.offline():
            return read_directory(hub.fetch(hub_id, []), guided=guided)
        names = hub.list_files(hub_id)
        found = read_directory(
            hub.fetch(hub_id, CONFIGURATIONS), guided=guided
        )  # Unsupported models are refused before their weights are downloaded.
        weights: list[str] = []
        for part in parts:
            if part == SAFETY_CHECKER and not found.safety_checker:
                continue
            own = [name.removeprefix(f"{part}/") for name in names if re.fullmatch(rf"{part}/[^/]+", name)]
            weights += [f"{part}/{name}" for name in choose_weights(part, own)[1]]
        if weights:
            hub.fetch(hub_id, weights)
        return found
    except hub.HubError as error:
        raise ComponentsError(str(error)) from error
    except WeightsError as error:
        raise ComponentsError(f"{hub_id}: {error}") from error
