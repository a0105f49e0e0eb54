"""Stable Diffusion's safety checker: a CLIP image encoder whose output is compared with embeddings of concepts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL.Image import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from tiue.files import one_line
from tiue.loading import load_part
from tiue.pipeline_directory import ComponentsError, PipelineDirectory, read_json

PART = "safety_checker"
FEATURE_EXTRACTOR = "feature_extractor/preprocessor_config.json"
_LEAVE_OUT = "(`safety_checker` off leaves it out)"
_LARGEST = 4096  # pixels of a prepared picture's sides
# diffusers rounds scores to three decimals and flags those above 0.
_ROUNDS_UP = 0.0005
_ADJUSTMENT = 0.01  # of the scores of a picture with a concept of special care


@dataclass(frozen=True)
class SafetyChecker:
    """The module, and the processor that prepares its pictures."""

    module: StableDiffusionSafetyChecker
    processor: CLIPImageProcessor


class Scorer(nn.Module):
    """The safety checker as a function of prepared pictures. diffusers' own returns no scores."""

    def __init__(self, checker: SafetyChecker) -> None:
        super().__init__()
        processor = checker.processor
        self.checker = checker.module
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        factor = 127.5 * processor.rescale_factor  # from pixels in [-1, 1]
        self.scale, self.shift = nn.Buffer(factor / std), nn.Buffer((factor - mean) / std)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, S, S) in [-1, 1] => score (B), above 0 for pictures that diffusers flags."""
        return self.of_normalized(image * self.scale + self.shift)

    def of_normalized(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) of the processor => score (B)."""
        checker = self.checker
        pooled = checker.vision_model(pixels)[1]
        embeddings = F.normalize(checker.visual_projection(pooled))
        special, concepts = (
            embeddings @ F.normalize(embeds).T - thresholds
            for embeds, thresholds in (
                (checker.special_care_embeds, checker.special_care_embeds_weights),
                (checker.concept_embeds, checker.concept_embeds_weights),
            )
        )
        adjustment = _ADJUSTMENT * (special.amax(dim=1) > _ROUNDS_UP).float()
        return concepts.amax(dim=1) + adjustment - _ROUNDS_UP


@torch.no_grad()
def score(checker: SafetyChecker, pictures: Sequence[Image]) -> Tensor:
    """Score pictures with the processor and the module => (B), above 0 for those that diffusers flags."""
    pixels = checker.processor(list(pictures), return_tensors="pt")["pixel_values"]
    return Scorer(checker).of_normalized(pixels)


def read_safety_checker(directory: PipelineDirectory) -> SafetyChecker | None:
    """Load the safety checker that a pipeline names, with its feature extractor.

    Returns:
        The safety checker in float32; None if the pipeline names none.

    Raises:
        ComponentsError: it is incomplete, or of another class.
    """
    if directory.safety_checker is None:
        return None
    cls = StableDiffusionSafetyChecker
    if directory.safety_checker != cls.__name__:
        shown = one_line(directory.safety_checker, 100)
        raise ComponentsError(f"{directory.root}: {shown} is not supported: expected {cls.__name__} {_LEAVE_OUT}")
    try:
        read_json(directory.root, f"{PART}/config.json")
        processor = _processor(directory)
        module = load_part(cls, directory.root / PART, PART)
    except ComponentsError as error:
        raise ComponentsError(f"{error} {_LEAVE_OUT}") from error
    sees, made = module.config.vision_config.image_size, processor.crop_size["height"]
    if sees != made:
        where = directory.root / FEATURE_EXTRACTOR
        raise ComponentsError(f"{where} makes pictures of {made} pixels, but the safety checker takes {sees}")
    return SafetyChecker(module, processor)


def _processor(directory: PipelineDirectory) -> CLIPImageProcessor:
    config = read_json(directory.root, FEATURE_EXTRACTOR)
    where = directory.root / FEATURE_EXTRACTOR
    try:
        processor = CLIPImageProcessor.from_dict(config)
    except Exception as error:  # Libraries raise anything for configurations that make no sense.
        raise ComponentsError(f"{where} cannot be loaded: {one_line(error)}") from error
    for problem in _problems(processor):
        raise ComponentsError(f"{where}: {problem}")
    return processor


def _problems(processor: Any) -> Iterator[str]:
    """Yield what the runtime cannot do: it resizes the shorter side, crops a square and normalizes."""
    for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if getattr(processor, step) is not True:
            yield f"{step} is {getattr(processor, step)!r:.40}: expected true"
    resize, crop = processor.size.get("shortest_edge"), processor.crop_size
    side = crop.get("height")
    if not (_is_size(resize) and _is_size(side) and side == crop.get("width") and side <= resize):
        yield f"size {processor.size!r:.80} and crop_size {crop!r:.80}: expected a shortest_edge of at least the square"
    if processor.resample not in range(6):
        yield f"resample is {processor.resample!r:.40}: expected one of Pillow's filters, 0 to 5"
    for name in ("image_mean", "image_std"):
        values = getattr(processor, name)
        if not (isinstance(values, list) and len(values) == 3 and all(_is_number(v) for v in values)):
            yield f"{name} is {values!r:.80}: expected three numbers"
    if not (_is_number(processor.rescale_factor) and all(processor.image_std)):
        yield f"rescale_factor {processor.rescale_factor!r:.40} and image_std {processor.image_std!r:.80}"


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
