"""`student.safetensors`: one self-contained file with everything a student needs.

Tensors are prefixed `unet.`, `text_encoder.` and `vae.`. The metadata holds configurations, schedules,
tokenizer, license and provenance as JSON.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiue.components import Components, ComponentsError, class_named
from tiue.unet import TiUE
from tiue.weights import WeightsError, fill

FORMAT = 1
_PARTS = ("unet", "text_encoder", "vae")


class CheckpointError(ValueError):
    """A student checkpoint cannot be written or read; the message says why, in one line."""


@dataclass(frozen=True)
class Student:
    """A distilled model, and what it was distilled for."""

    components: Components
    encoder_timestep: int  # t_1 of the schedule it was trained for
    schedules: dict[int, list[int]]  # number of steps -> descending timesteps, e.g. {4: [751, 501, 251, 1]}
    base_model: str = "unknown"
    provenance: dict[str, Any] = field(default_factory=dict)  # JSON: how it was trained
    shared_up_blocks: int = 0  # up blocks that belong to the encoder
    share_encoder: bool = True  # False: a control, whose encoder was trained to run at every timestep
    declared: bool = True  # False: made of a pipeline, which does not say which schedules it was trained for

    def tiue(self, steps: int | None = None) -> TiUE:
        """The network for one of the schedules; the longest by default.

        Raises ValueError for steps that it was not trained for, and for a student whose encoder is not shared.
        """
        if not self.share_encoder:
            raise ValueError(f"{self.components.name} is a control without a shared encoder: it cannot be split")
        steps = max(self.schedules) if steps is None else steps
        if steps not in self.schedules:
            raise ValueError(f"the student was trained for {sorted(self.schedules)} steps, not {steps}")
        schedule = self.components.noise_schedule.closed_form(self.schedules[steps])
        return TiUE(self.components.unet, schedule, self.encoder_timestep, self.shared_up_blocks)


def save_student(path: str | Path, student: Student, dtype: torch.dtype | None = None) -> None:
    """Write `student` to `path`, by way of a temporary file beside it, so that `path` is never half-written.

    Args:
        path: usually ends in .safetensors; an existing file is replaced.
        student: modules may be on any device.
        dtype: how floating-point tensors are stored (torch.float16 halves the file); as they are by default.

    Raises CheckpointError if a weight is not finite, in the given dtype.
    """
    path = Path(path)
    components = student.components
    tensors = {}
    for part in _PARTS:
        for name, tensor in getattr(components, part).state_dict().items():
            tensor = tensor.detach().cpu()
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            if not tensor.isfinite().all():
                raise CheckpointError(f"{path} not written: {part}.{name} is not finite as {tensor.dtype}")
            tensors[f"{part}.{name}"] = tensor.contiguous()
    metadata = {
        "unet": _config(components.unet),
        "text_encoder": _config(components.text_encoder),
        "vae": _config(components.vae),
        "scheduler": _without_paths(components.scheduler_config),
        "tokenizer": json.loads(components.tokenizer.backend_tokenizer.to_str()),
        "tokenizer_settings": _tokenizer_settings(components.tokenizer),
        "name": components.name,
        "license": components.license,
        "base_model": student.base_model,
        "encoder_timestep": student.encoder_timestep,
        "schedules": student.schedules,
        "shared_up_blocks": student.shared_up_blocks,
        "share_encoder": student.share_encoder,
        "provenance": student.provenance,
    }
    strings = {"tiue_student": str(FORMAT)} | {key: json.dumps(value) for key, value in metadata.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, strings)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_student(path: str | Path) -> Student:
    """Read a student: modules in float32 whatever the file stores, in evaluation mode, on the CPU.

    Raises CheckpointError, in one line, if the file is missing, damaged, not a student, of a newer format, has
    metadata of which no model or schedule can be made, or does not hold exactly the tensors that its configurations
    call for.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _parse(path, file.metadata() or {})
            names = list(file.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    try:
        return _build(path, metadata, names)
    except CheckpointError:
        raise
    except ComponentsError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has incomplete or malformed metadata: {error!r}") from error


def _parse(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    version = metadata.get("tiue_student")
    if version is None:
        raise CheckpointError(f"{path} is not a TiUE student: its metadata has no tiue_student")
    if not version.isdigit() or int(version) > FORMAT:
        raise CheckpointError(f"{path} has student format {version}; this tiue reads up to {FORMAT}")
    try:
        return {key: json.loads(value) for key, value in metadata.items()}
    except ValueError as error:
        raise CheckpointError(f"{path} has malformed metadata: {error}") from error


def _build(path: Path, metadata: dict[str, Any], names: list[str]) -> Student:
    modules = {}
    with init_empty_weights():  # parameters come from the file, so none is initialised first
        modules["unet"] = UNet2DConditionModel.from_config(metadata["unet"])
        vae, text = metadata["vae"], metadata["text_encoder"]
        vae_class = class_named(diffusers, vae["_class_name"], (AutoencoderKL, AutoencoderTiny))
        modules["vae"] = vae_class.from_config(vae)
        text_class = class_named(transformers, text["_class_name"], PreTrainedModel)
        modules["text_encoder"] = text_class(text_class.config_class.from_dict(text))
    unknown = [name for name in names if name.partition(".")[0] not in modules]
    if unknown:
        raise CheckpointError(f"{path} has an unexpected tensor {unknown[0]} ({len(unknown)} in all)")
    for part, module in modules.items():
        try:
            fill(module, path, f"{part}.")
        except WeightsError as error:
            raise CheckpointError(f"{path} {error}") from error
    components = Components(
        **modules,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=_tokenizer(path, metadata["tokenizer"]),
            **metadata["tokenizer_settings"],
        ),
        scheduler_config=metadata["scheduler"],
        name=metadata["name"],
        license=metadata["license"] if "license" in metadata else metadata["licence"],  # the key was renamed
    )
    student = Student(
        components=components,
        encoder_timestep=metadata["encoder_timestep"],
        schedules={int(steps): timesteps for steps, timesteps in metadata["schedules"].items()},
        shared_up_blocks=metadata.get("shared_up_blocks", 0),  # files older than the settings have none
        share_encoder=metadata.get("share_encoder", True),
        base_model=metadata["base_model"],
        provenance=metadata["provenance"],
    )
    _check_schedules(path, student)
    return student


def _tokenizer(path: Path, content: Any) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # which is what the tokenizers library raises
        raise CheckpointError(f"{path} has a malformed tokenizer: {error}") from error


def _check_schedules(path: Path, student: Student) -> None:
    """Raise CheckpointError unless the student can draw with every schedule it names, and names one."""
    if not student.schedules:
        raise CheckpointError(f"{path} names no schedule that it was trained for")
    for steps, timesteps in student.schedules.items():
        if any(type(t) is not int for t in [student.encoder_timestep, *timesteps]) or len(timesteps) != steps:
            found = f"{timesteps} and {student.encoder_timestep!r} for the encoder"
            raise CheckpointError(f"{path}: expected {steps} timesteps, and one for the encoder, found {found}")
        try:
            replace(student, share_encoder=True).tiue(steps)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _config(module: nn.Module) -> dict[str, Any]:
    config = module.config
    content = config.to_dict() if isinstance(module, PreTrainedModel) else dict(config)
    return _without_paths(content) | {"_class_name": type(module).__name__}


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the libraries' private keys, one of which is where it was loaded from."""
    return {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}


def _tokenizer_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What tokenizer.json leaves out: the arguments with which PreTrainedTokenizerFast tokenises alike."""
    return {
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
