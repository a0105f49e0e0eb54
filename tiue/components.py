"""The parts of a text-to-image model: reading them from a diffusers pipeline directory, encoding prompts."""

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from tiue import hub
from tiue.schedule import NoiseSchedule, ignored_options
from tiue.tokenization import load_tokenizer
from tiue.unet import check_supported
from tiue.weights import WeightsError, choose_weights, fill, tensor_names

_WITH_WEIGHTS = ("unet", "text_encoder", "vae")
_PARTS = (*_WITH_WEIGHTS, "tokenizer", "scheduler")
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # no picture depends on these
_CONFIGURATIONS = (
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    *(f"{part}/config.json" for part in _WITH_WEIGHTS),
)


class ComponentsError(ValueError):
    """A pipeline directory lacks a part, or holds one of a kind we do not handle."""


@dataclass(frozen=True)
class Geometry:
    """The shapes of a model's latents and pictures."""

    channels: int  # C, of latents
    height: int  # h of the size that the model was made for, in latents
    width: int  # w of it, in latents
    pixels_per_latent: int
    multiple: int  # sides of pictures are multiples of this, in pixels

    @classmethod
    def from_configs(cls, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> "Geometry":
        """Read the geometry from the configurations of a UNet and a VAE.

        Raises:
            ComponentsError: the UNet's configuration has no default size.
        """
        size = unet.get("sample_size")
        if size is None:
            raise ComponentsError("the UNet's configuration has no sample_size, so there is no default image size")
        height, width = (size, size) if isinstance(size, int) else size
        pixels = 2 ** (len(vae["block_out_channels"]) - 1)
        halvings = len(unet["block_out_channels"]) - 1  # the UNet halves a side this often, and doubles it again
        return cls(unet["in_channels"], height, width, pixels, pixels * 2**halvings)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the size that the model was made for."""
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class Components:
    """A text-to-image model, in parts. Modules are in evaluation mode, float32, on the CPU, as loaded."""

    unet: UNet2DConditionModel
    text_encoder: PreTrainedModel  # CLIPTextModel, BertModel ...: its first output is the text (B, L, D)
    vae: AutoencoderKL | AutoencoderTiny
    tokenizer: PreTrainedTokenizerFast
    scheduler_config: dict[str, Any]
    name: str
    license: str

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise process that `scheduler_config` describes. Raises ValueError as `NoiseSchedule.from_config`."""
        return NoiseSchedule.from_config(self.scheduler_config)

    @property
    def geometry(self) -> Geometry:
        """The shapes of latents and pictures. Raises ComponentsError as `Geometry.from_configs`."""
        return Geometry.from_configs(self.unet.config, self.vae.config)


def latent_scaling(vae: AutoencoderKL | AutoencoderTiny) -> tuple[float, float]:
    """Return the (scale, shift) with which a VAE's own latents are z / scale + shift for the UNet's z."""
    return vae.config["scaling_factor"], vae.config.get("shift_factor") or 0.0


def decode_latents(vae: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w), as the UNet makes them => image (B, 3, H, W) in [-1, 1]."""
    scale, shift = latent_scaling(vae)
    return vae.decode(latents / scale + shift, return_dict=False)[0]


def load_components(
    directory: str | Path, *, local_files_only: bool = True, unet_file: str | Path | None = None
) -> Components:
    """Load a diffusers pipeline directory. Weights are read from safetensors only, never from pickles.

    Each part's weights may be one file or shards, of any precision; the variant "fp16" is read where a part has no
    other. Memory holds them once, as float32. The tokenizer may be in the files of the slow class or the fast one.

    Args:
        directory: holds model_index.json and unet/, text_encoder/, vae/, tokenizer/ and scheduler/.
        local_files_only: if False and there is no such directory, take the name for a Hugging Face Hub id and
            download it.
        unet_file: read the UNet's weights from this safetensors file, under the names that diffusers gives them
            or those with "unet." before; unet/ then needs a config.json only, and the model is named after the file.

    Warns of scheduler options that a schedule in closed form leaves out.
    Raises ComponentsError, naming the part, for anything missing, unreadable or of an unsupported class.
    """
    parts = [part for part in _WITH_WEIGHTS if part != "unet" or unet_file is None]
    root = Path(directory)
    if not root.is_dir():
        if local_files_only or not hub.is_hub_id(str(directory)):
            raise ComponentsError(f"no such pipeline directory: {directory}")
        root = _download(str(directory), parts)
    classes = _classes(root)
    scheduler_config = _read_scheduler(root)
    _read_unet(root)  # what is not supported is refused before its weights are read
    tokenizer = _load_tokenizer(classes["tokenizer"], root, classes["slow_tokenizer"])
    unet = _load_module(classes["unet"], root, "unet") if unet_file is None else _load_unet(Path(unet_file), root)
    return Components(
        unet=unet,
        text_encoder=_load_module(classes["text_encoder"], root, "text_encoder"),
        vae=_load_module(classes["vae"], root, "vae"),
        tokenizer=tokenizer,
        scheduler_config=scheduler_config,
        name=Path(directory).resolve().name if unet_file is None else Path(unet_file).stem,
        license=_license(root) if unet_file is None else "unknown",  # the base's license says nothing of the UNet's
    )


def read_configs(directory: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The UNet's and the scheduler's configuration of a pipeline directory, no weights. Raises ComponentsError."""
    root = Path(directory)
    if not root.is_dir():
        raise ComponentsError(f"no such pipeline directory: {directory}")
    _classes(root)
    return _read_unet(root), _read_scheduler(root)


def load_tiny_vae(directory: str | Path) -> AutoencoderTiny:
    """Load an AutoencoderTiny (TAESD's layout) from its own directory. Raises ComponentsError."""
    root = Path(directory)
    if not root.is_dir():
        raise ComponentsError(f"no such directory: {directory}")
    class_named(diffusers, str(_read_json(root, "config.json").get("_class_name")), AutoencoderTiny)
    return _load_module(AutoencoderTiny, root.parent, root.name)


def _download(hub_id: str, parts: Sequence[str]) -> Path:
    """A Hub model's snapshot, with the weights of `parts` in one form each. Raises ComponentsError."""
    try:
        if hub.offline():
            return hub.fetch(hub_id, [])
        names = hub.list_files(hub_id)
        root = hub.fetch(hub_id, _CONFIGURATIONS)
        _classes(root)  # what is not supported is refused before gigabytes come
        weights: list[str] = []
        for part in parts:
            own = [name.removeprefix(f"{part}/") for name in names if re.fullmatch(rf"{part}/[^/]+", name)]
            weights += [f"{part}/{name}" for name in choose_weights(part, own)[1]]
        return hub.fetch(hub_id, weights)
    except hub.HubError as error:
        raise ComponentsError(str(error)) from error
    except WeightsError as error:
        raise ComponentsError(f"{hub_id}: {error}") from error


def _read_json(root: Path, name: str) -> dict[str, Any]:
    path = root / name
    if not path.is_file():
        raise ComponentsError(f"{root} is not a complete diffusers pipeline: {name} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ComponentsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ComponentsError(f"{path} must hold a JSON object")
    return content


def _classes(root: Path) -> dict[str, Any]:
    """The classes that model_index.json names for the parts, if they are what we handle and all there is."""
    index = _read_json(root, "model_index.json")
    named = {part: value[1] for part, value in index.items() if isinstance(value, list) and len(value) == 2}
    others = [part for part in named if named[part] and part not in _PARTS + _LEFT_OUT]
    if others:
        kind = index.get("_class_name", "the pipeline")
        raise ComponentsError(f"{kind} is not supported: expected no parts but {', '.join(_PARTS)}; it has {others[0]}")
    for part in _PARTS:
        if part != "scheduler" and named.get(part) is None:
            raise ComponentsError(f"model_index.json names no {part}")
    return {
        "unet": class_named(diffusers, named["unet"], UNet2DConditionModel),
        "vae": class_named(diffusers, named["vae"], (AutoencoderKL, AutoencoderTiny)),
        "text_encoder": class_named(transformers, named["text_encoder"], PreTrainedModel),
        "tokenizer": class_named(
            transformers, named["tokenizer"].removesuffix("Fast") + "Fast", PreTrainedTokenizerFast
        ),
        "slow_tokenizer": not named["tokenizer"].endswith("Fast"),
    }


def _read_unet(root: Path) -> dict[str, Any]:
    config = _read_json(root, "unet/config.json")
    try:
        check_supported(config)
    except ValueError as error:
        raise ComponentsError(f"{root / 'unet'}: {error}") from error
    return config


def _read_scheduler(root: Path) -> dict[str, Any]:
    config = _read_json(root, "scheduler/scheduler_config.json")
    try:
        NoiseSchedule.from_config(config)
    except ValueError as error:
        raise ComponentsError(f"{root / 'scheduler'}: {error}") from error
    if ignored := ignored_options(config):
        options = " and ".join(ignored)
        warnings.warn(f"{root / 'scheduler'} sets {options}, left out: steps here are not clipped", stacklevel=3)
    return config


def class_named(library: Any, name: str, expected: type | tuple[type, ...]) -> Any:
    """A class of `library` by name, if it derives from `expected`; ComponentsError otherwise."""
    found = getattr(library, name, None)
    if not (isinstance(found, type) and issubclass(found, expected)):
        allowed = expected if isinstance(expected, tuple) else (expected,)
        raise ComponentsError(f"{name} is not supported: expected {' or '.join(c.__name__ for c in allowed)}")
    return found


def _load_module(cls: Any, root: Path, part: str) -> Any:
    _read_json(root, f"{part}/config.json")
    directory = root / part
    if issubclass(cls, PreTrainedModel):  # which of itself does not say which tensor is misshapen
        options = {"dtype": torch.float32, "ignore_mismatched_sizes": True}
    else:
        options = {"torch_dtype": torch.float32}
    try:
        variant, _ = choose_weights(part, (path.name for path in directory.iterdir()))
        with _quiet():
            module, report = cls.from_pretrained(
                directory,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ComponentsError(f"{directory} cannot be loaded as {cls.__name__}: {_one_line(error)}") from error
    # What the libraries would leave at random.
    problems = [("lacks tensor", report["missing_keys"]), ("has a wrong shape for", report["mismatched_keys"])]
    if part != "text_encoder":  # whose head, for which we have no use, is often saved along
        problems.append(("has an unexpected tensor", report["unexpected_keys"]))
    for problem, names in problems:
        if names:
            raise ComponentsError(f"{directory} cannot be loaded: it {problem} {min(names)} ({len(names)} in all)")
    return module.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, the libraries do not tell at length of weights that do not fit, which we refuse in a line."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _load_unet(path: Path, root: Path) -> UNet2DConditionModel:
    """The UNet that a pipeline's configuration describes, with the weights of a file of its own."""
    config = _read_unet(root)
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(config)
    try:
        prefixed = all(name.startswith("unet.") for name in tensor_names(path))
        fill(unet, path, "unet." if prefixed else "")
    except WeightsError as error:
        raise ComponentsError(f"{path} {error}, by {root / 'unet' / 'config.json'}") from error
    return unet


def _load_tokenizer(cls: Any, root: Path, like_slow: bool) -> PreTrainedTokenizerFast:
    if not (root / "tokenizer").is_dir():
        raise ComponentsError(f"{root} is not a complete diffusers pipeline: tokenizer is missing")
    try:
        tokenizer = load_tokenizer(cls, root / "tokenizer", like_slow=like_slow)
    except Exception as error:  # which is what the tokenizers library raises
        message = f"{root / 'tokenizer'} cannot be loaded as {cls.__name__}: {_one_line(error)}"
        raise ComponentsError(message) from error
    limit = _read_json(root, "text_encoder/config.json").get("max_position_embeddings")
    if tokenizer.model_max_length == VERY_LARGE_INTEGER and limit:  # vocab.json and merges.txt do not say
        tokenizer.model_max_length = limit
    return tokenizer


def _one_line(error: Exception, length: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"{text[:length]} ..."


def _license(root: Path) -> str:
    """Return the license that a model card's front matter declares, or "unknown"."""
    card = root / "README.md"
    found = card.is_file() and re.search(r"^license:[ \t]*(\S.*?)\s*$", card.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "unknown"
