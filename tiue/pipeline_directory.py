"""The configurations of a diffusers pipeline directory: read once, checked, and repaired as in diffusers."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from packaging.version import InvalidVersion, Version
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiue.files import OneLineError
from tiue.schedule import NoiseSchedule, ignored_options
from tiue.unet import GUIDANCE_INPUT, check_supported

WITH_WEIGHTS = ("unet", "text_encoder", "vae")
CONFIGURATIONS = (
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    *(f"{part}/config.json" for part in WITH_WEIGHTS),
    "safety_checker/config.json",
    "feature_extractor/preprocessor_config.json",
)
_PARTS = (*WITH_WEIGHTS, "tokenizer", "scheduler")
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # No picture depends on these.
# The pipelines that repair configurations of 2022 when they are constructed.
_REPAIRING = ("StableDiffusion", "AltDiffusion", "CycleDiffusion", "OnnxStableDiffusion")
_LONGEST_CARD = 65_536  # bytes of a model card that are searched for its license
_LONGEST_LICENSE = 100  # characters


class ComponentsError(OneLineError):
    """A pipeline directory lacks a part, or holds an unsupported one."""


@dataclass(frozen=True)
class PipelineDirectory:
    """The content of a pipeline directory, without weights."""

    root: Path
    classes: dict[str, Any]  # of the parts with weights and of the tokenizer
    slow_tokenizer: bool  # the pipeline names the slow tokenizer
    configs: dict[str, dict[str, Any]]  # of the parts with weights and of the scheduler
    license: str  # the model card's, or "unknown"
    safety_checker: str | None  # the class that the pipeline names
    warnings: tuple[str, ...]  # notes on repaired and ignored parts


def read_directory(root: Path, *, guided: bool = False) -> PipelineDirectory:
    """Read and check the configurations of a pipeline directory.

    Args:
        root: the directory.
        guided: accept a UNet that takes a guidance scale as an input.

    Raises:
        ComponentsError: a part is missing, malformed or of an unsupported class.
    """
    if not (root / "model_index.json").is_file():
        raise ComponentsError(
            f"{root} is not a complete diffusers pipeline: model_index.json is missing{_other_directory(root)}"
        )
    index = read_json(root, "model_index.json")
    named = {
        part: value[1] if isinstance(value[1], str) else None
        for part, value in index.items()
        if isinstance(value, list) and len(value) == 2
    }
    classes = _classes(index, named)
    configs = {part: read_json(root, f"{part}/config.json") for part in WITH_WEIGHTS}
    configs["scheduler"] = read_json(root, "scheduler/scheduler_config.json")
    for part in WITH_WEIGHTS:
        check_not_quantized(root / part, configs[part])
    notes: list[str] = []
    if str(index.get("_class_name") or "StableDiffusionPipeline").startswith(_REPAIRING):
        notes += _repair(configs, named.get("scheduler"))
    _check(root, configs, guided)
    if named.get("scheduler"):  # diffusers makes this class, whatever the configuration names.
        configs["scheduler"]["_class_name"] = named["scheduler"]
    if ignored := ignored_options(configs["scheduler"]):
        notes.append(f"scheduler sets {' and '.join(ignored)}, left out: steps here are not clipped")
    return PipelineDirectory(
        root=root,
        classes=classes,
        slow_tokenizer=not str(named["tokenizer"]).endswith("Fast"),
        configs=configs,
        license=_license(root),
        safety_checker=named.get("safety_checker"),
        warnings=tuple(f"{root}: {note}" for note in notes),
    )


def read_json(root: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of a pipeline. Raises ComponentsError."""
    path = root / name
    if not path.is_file():
        raise ComponentsError(f"{root} is not a complete diffusers pipeline: {name} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ComponentsError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise ComponentsError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise ComponentsError(f"{path} must hold a JSON object")
    return content


def class_named(library: Any, name: Any, expected: type | tuple[type, ...]) -> Any:
    """Return a class of `library` by name, if it derives from `expected`. Raises ComponentsError."""
    found = getattr(library, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, expected)):
        allowed = expected if isinstance(expected, tuple) else (expected,)
        shown = str(name)[:100]
        raise ComponentsError(f"{shown} is not supported: expected {' or '.join(c.__name__ for c in allowed)}")
    return found


def _classes(index: Mapping[str, Any], named: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the classes that model_index.json names for the parts, if all are supported and no other part is named."""
    others = [part for part in named if named[part] and part not in _PARTS + _LEFT_OUT]
    if others:
        kind = index.get("_class_name", "the pipeline")
        raise ComponentsError(f"{kind} is not supported: expected no parts but {', '.join(_PARTS)}; it has {others[0]}")
    for part in _PARTS:
        if part != "scheduler" and named.get(part) is None:
            raise ComponentsError(
                f"{index.get('_class_name', 'the pipeline')} is not supported: model_index.json names no {part}"
            )
    tokenizer = str(named["tokenizer"]).removesuffix("Fast") + "Fast"
    return {
        "unet": class_named(diffusers, named["unet"], UNet2DConditionModel),
        "vae": class_named(diffusers, named["vae"], (AutoencoderKL, AutoencoderTiny)),
        "text_encoder": class_named(transformers, named["text_encoder"], PreTrainedModel),
        "tokenizer": class_named(transformers, tokenizer, PreTrainedTokenizerFast),
    }


def _check(root: Path, configs: Mapping[str, Mapping[str, Any]], guided: bool) -> None:
    try:
        check_supported({**configs["unet"], **({GUIDANCE_INPUT: None} if guided else {})})
    except ValueError as error:
        raise ComponentsError(f"{root / 'unet'}: {error}") from error
    try:
        NoiseSchedule.from_config(configs["scheduler"])
    except ValueError as error:
        raise ComponentsError(f"{root / 'scheduler'}: {error}") from error


def check_not_quantized(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise ComponentsError for a part whose configuration says that its weights are quantized."""
    if quantized := config.get("quantization_config"):
        how = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
        raise ComponentsError(
            f"{directory} is quantized (quantization_config: {str(how)[:100]}): expected weights in float32, float16 "
            "or bfloat16; take those that it was quantized from"
        )


def _repair(configs: dict[str, dict[str, Any]], scheduler_class: str | None) -> list[str]:
    """Repair configurations in place, as diffusers' StableDiffusionPipeline does. Return a note on each repair."""
    notes: list[str] = []
    scheduler, unet = configs["scheduler"], configs["unet"]
    offset = _option(scheduler, "steps_offset", scheduler_class)
    if offset not in (None, 1):
        scheduler["steps_offset"] = 1
        notes.append(
            f"the scheduler's configuration is outdated: steps_offset {offset!r:.40} is read as 1, as in diffusers"
        )
    if _option(scheduler, "clip_sample", scheduler_class) is True:
        given = "true" if "clip_sample" in scheduler else "missing"
        scheduler["clip_sample"] = False
        notes.append(
            f"the scheduler's configuration is outdated: clip_sample, {given}, is read as false, as in diffusers"
        )
    size = unet.get("sample_size")
    if isinstance(size, int) and size < 64 and _is_older_than_0_9(unet.get("_diffusers_version")):
        unet["sample_size"] = 64
        notes.append(f"the UNet's configuration is outdated: sample_size {size} is read as 64, as in diffusers")
    return notes


def _option(scheduler: Mapping[str, Any], name: str, class_name: str | None) -> Any:
    """Return an option of a scheduler, or the default of its class, or None if the class has no such option."""
    if name in scheduler:
        return scheduler[name]
    cls = getattr(diffusers, class_name or str(scheduler.get("_class_name")), None)
    parameter = signature(cls.__init__).parameters.get(name) if isinstance(cls, type) else None
    return None if parameter is None else parameter.default


def _is_older_than_0_9(version: Any) -> bool:
    try:
        return Version(Version(str(version)).base_version) < Version("0.9.0.dev0")
    except InvalidVersion:
        return False


def _other_directory(root: Path) -> str:
    """Say what a directory is that is not a pipeline. "" if that is unknown."""
    if (root / "bundle.json").is_file():
        return "; it is a bundle, which is exported already"
    if (root / "adapter_config.json").is_file() or any(root.glob("*lora*.safetensors")):
        return "; it holds a LoRA: give its model, and name the LoRA's file in `lora`"
    if (root / "config.json").is_file():
        return "; it is one part of a pipeline: give the folder above it"
    if files := sorted(root.glob("*.safetensors")):
        return f"; it holds {files[0].name}: give that file"
    if pickles := sorted(path for path in root.iterdir() if path.suffix in (".ckpt", ".bin", ".pt", ".pth")):
        return f"; it holds {pickles[0].name}, a pickle, which is never loaded"
    return ""


def _license(root: Path) -> str:
    """Return the license that a model card's front matter declares, or "unknown"."""
    try:
        with (root / "README.md").open("rb") as file:
            text = file.read(_LONGEST_CARD).decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    except OSError:
        return "unknown"
    front = re.match(r"---[ \t]*\n(.*?)^(---|\.\.\.)[ \t]*$", text, re.MULTILINE | re.DOTALL)
    fields = front[1] if front else text
    found = re.search(r"^license:[ \t]*(\S.*?)[ \t]*(?:[ \t]#.*)?$", fields, re.MULTILINE)
    items = re.search(r"^license:[ \t]*\n((?:[ \t]*-[ \t]+.*\n?)+)", fields, re.MULTILINE)
    if items:
        value = ", ".join(line.strip().removeprefix("-").strip() for line in items[1].splitlines() if line.strip())
    else:
        value = found[1].strip("[]") if found else ""
    value = " ".join("".join(c for c in value if c.isprintable()).replace('"', "").replace("'", "").split())
    return value if 0 < len(value) <= _LONGEST_LICENSE and value not in ("null", "~", "|", ">") else "unknown"
