"""The parts of a text-to-image model: reading them from a diffusers pipeline directory, encoding prompts."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast


class ComponentsError(ValueError):
    """A pipeline directory lacks a part, or holds one of a kind we do not handle."""


@dataclass(frozen=True)
class Components:
    """A text-to-image model, in parts. Modules are in evaluation mode, float32, on the CPU, as loaded."""

    unet: UNet2DConditionModel
    text_encoder: PreTrainedModel  # CLIPTextModel, BertModel ...: its first output is the text [B,L,D]
    vae: AutoencoderKL | AutoencoderTiny
    tokenizer: PreTrainedTokenizerFast
    scheduler_config: dict[str, Any]
    name: str
    licence: str


def load_components(directory: str | Path, *, local_files_only: bool = True) -> Components:
    """Load a diffusers pipeline directory. Weights are read from safetensors only, never from pickles.

    Args:
        directory: holds model_index.json and unet/, text_encoder/, vae/, tokenizer/ and scheduler/.
        local_files_only: if False and there is no such directory, take the name for a Hugging Face Hub id and
            download it.

    Raises ComponentsError, naming the part, for anything missing, unreadable or of an unsupported class.
    """
    root = Path(directory)
    if not root.is_dir():
        if local_files_only:
            raise ComponentsError(f"no such pipeline directory: {directory}")
        root = _download(str(directory))
    index = _read_json(root, "model_index.json")
    unet_class = _class_of(index, "unet", diffusers, UNet2DConditionModel)
    vae_class = _class_of(index, "vae", diffusers, (AutoencoderKL, AutoencoderTiny))
    text_class = _class_of(index, "text_encoder", transformers, PreTrainedModel)
    return Components(
        unet=_load_module(unet_class, root, "unet"),
        text_encoder=_load_module(text_class, root, "text_encoder"),
        vae=_load_module(vae_class, root, "vae"),
        tokenizer=_load_tokenizer(index, root),
        scheduler_config=_read_json(root, "scheduler/scheduler_config.json"),
        name=Path(directory).resolve().name,
        licence=_licence(root),
    )


def tokenize(components: Components, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts => (input_ids int64 [B,L], attention mask int64 [B,L] or, where the model uses none, None).

    Prompts are padded and cut to L = tokenizer.model_max_length. Whether the mask is used is diffusers'
    convention: `use_attention_mask` in the text encoder's configuration.
    """
    tokens = components.tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=components.tokenizer.model_max_length,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask if uses_attention_mask(components.text_encoder) else None


def encode_text(components: Components, prompts: Sequence[str]) -> torch.Tensor:
    """Prompts => text embeddings [B,L,D], on the text encoder's device."""
    input_ids, mask = tokenize(components, prompts)
    device = components.text_encoder.device
    return components.text_encoder(
        input_ids=input_ids.to(device), attention_mask=None if mask is None else mask.to(device)
    )[0]


def uses_attention_mask(text_encoder: PreTrainedModel) -> bool:
    """Whether the text encoder is to be given the attention mask (CLIP's is not)."""
    return bool(getattr(text_encoder.config, "use_attention_mask", False))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    weights = ["*/model.safetensors", "*/diffusion_pytorch_model.safetensors"]
    return Path(snapshot_download(hub_id, allow_patterns=["README.md", "*.json", "*.txt", *weights]))


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


def _class_of(index: dict[str, Any], part: str, library: Any, expected: type | tuple[type, ...]) -> Any:
    """The class that model_index.json names for a part, if it is one of the expected."""
    name = (index.get(part) or [None, None])[1]
    if name is None:
        raise ComponentsError(f"model_index.json names no {part}")
    return class_named(library, name, expected)


def class_named(library: Any, name: str, expected: type | tuple[type, ...]) -> Any:
    """A class of `library` by name, if it derives from `expected`; ComponentsError otherwise."""
    found = getattr(library, name, None)
    if not (isinstance(found, type) and issubclass(found, expected)):
        allowed = expected if isinstance(expected, tuple) else (expected,)
        raise ComponentsError(f"{name} is not supported: expected {' or '.join(c.__name__ for c in allowed)}")
    return found


def _load_module(cls: Any, root: Path, part: str) -> Any:
    _read_json(root, f"{part}/config.json")
    try:
        module = cls.from_pretrained(root / part, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ComponentsError(f"{root / part} cannot be loaded as {cls.__name__}: {reason}") from error
    return module.float().eval()


def _load_tokenizer(index: dict[str, Any], root: Path) -> PreTrainedTokenizerFast:
    name = (index.get("tokenizer") or [None, None])[1]
    if name is None:
        raise ComponentsError("model_index.json names no tokenizer")
    cls = class_named(transformers, name.removesuffix("Fast") + "Fast", PreTrainedTokenizerFast)
    if not (root / "tokenizer").is_dir():
        raise ComponentsError(f"{root} is not a complete diffusers pipeline: tokenizer is missing")
    try:
        return cls.from_pretrained(root / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ComponentsError(f"{root / 'tokenizer'} cannot be loaded as {cls.__name__}: {reason}") from error


def _licence(root: Path) -> str:
    """The licence that a model card's front matter declares, or "unknown"."""
    card = root / "README.md"
    found = card.is_file() and re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "unknown"
