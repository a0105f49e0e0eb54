"""A request for pictures: the fields of its body, each checked, as OpenAI names them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from tiue_runtime.errors import clip, shorten
from tiue_runtime.options import LESSONS
from tiue_runtime.serve.api_errors import ApiError, invalid
from tiue_runtime.serve.jobs import Drawing
from tiue_runtime.serve.nearest_size import Size, made_for, nearest

if TYPE_CHECKING:
    from tiue_runtime.bundle import Manifest
    from tiue_runtime.serve.server_settings import ServerSettings

Format = Literal["png", "jpeg", "webp"]
_AUTO = "auto"
_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})", re.ASCII)
_INTEGER = re.compile(r"-?[0-9]{1,20}", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?", re.ASCII)
_SEEDS = 2**64

# Fields of OpenAI's models that a student has no use for. They are accepted with these values, and change nothing.
_WITHOUT_EFFECT = {
    "quality": ("auto", "low", "medium", "high", "standard", "hd"),
    "style": ("vivid", "natural"),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
}
_FIELDS = (
    *("prompt", "model", "n", "size", "output_format", "output_compression", "response_format", "stream"),
    *("partial_images", "user", "safety_identifier", "seed", "steps", "num_inference_steps", "timeout"),
    *_WITHOUT_EFFECT,
)


@dataclass(frozen=True)
class ImageRequest:
    """A request that is complete and checked."""

    model: str
    drawing: Drawing
    size: Size  # of the pictures in the answer
    format: Format
    quality: int | None  # of JPEG and WebP, 1 to 100
    as_url: bool
    stream: bool
    partial_images: int


def read_request(
    content: Mapping[str, Any], models: Mapping[str, Manifest], settings: ServerSettings, *, form: bool = False
) -> ImageRequest:
    """Check the fields of a request and complete them.

    Args:
        content: the fields. None means the same as absent.
        models: by name. The first is the default.
        settings: hold the limits.
        form: whether the values come from a form, where numbers are strings.

    Raises:
        ApiError: 400 with the name of the field that is wrong.
    """
    fields = _Fields(content, form)
    fields.refuse_others()
    model = fields.choice("model", tuple(models), next(iter(models)), "model_not_found")
    manifest = models[model]
    prompt = _prompt(fields, settings.most_prompt)
    count = fields.integer("n", 1, settings.most_pictures, 1)
    seed = fields.integer("seed", 0, _SEEDS - count, secrets.randbits(32))
    size = _size(fields, manifest, settings.most_pixels)
    drawn = nearest(made_for(manifest), size)
    format = cast(Format, fields.choice("output_format", get_args(Format), "png"))
    stream = fields.boolean("stream", False)
    partial_images = fields.integer("partial_images", 0, 3, 0)
    if partial_images and not stream:
        raise invalid("partial_images", "partial_images needs stream: true")
    as_url = fields.choice("response_format", ("b64_json", "url"), "b64_json") == "url"
    if as_url and stream:
        raise invalid("response_format", "response_format: a stream holds its pictures as b64_json, not as url")
    for name, values in _WITHOUT_EFFECT.items():
        if name == "background" and fields.get(name) == "transparent":
            raise invalid(name, "background: the pictures of this model have no transparency; use auto or opaque")
        fields.choice(name, values, values[0])
    for name in ("user", "safety_identifier"):
        fields.text(name, 1000)  # accepted, and not used
    return ImageRequest(
        model=model,
        drawing=Drawing(
            prompt,
            seed,
            count,
            _steps(fields, manifest),
            drawn.height,
            drawn.width,
            fields.number("timeout", settings.timeout),
        ),
        size=size,
        format=format,
        quality=_quality(fields, format),
        as_url=as_url,
        stream=stream,
        partial_images=partial_images,
    )


def _prompt(fields: _Fields, most: int) -> str:
    prompt = fields.text("prompt", most)
    if prompt is None:
        raise invalid("prompt", "prompt: expected a description of the picture, got none", "missing_required_parameter")
    if not prompt.strip():
        raise invalid("prompt", "prompt: expected a description of the picture, got an empty string")
    return prompt


def _steps(fields: _Fields, manifest: Manifest) -> int:
    names = [name for name in ("steps", "num_inference_steps") if fields.get(name) is not None]
    known = sorted(manifest.schedules)
    counts = {name: fields.integer(name, 1, 2**20, 1) for name in names}
    for name, count in counts.items():
        if count not in known:
            expected = ", ".join(map(str, known))
            raise invalid(name, f"{name}: this model was trained for {expected}, got {count}")
    if len(set(counts.values())) > 1:
        raise invalid(names[1], "steps and num_inference_steps mean the same; give one of them")
    return next(iter(counts.values()), manifest.default_steps)


def _size(fields: _Fields, manifest: Manifest, most: int) -> Size:
    text = fields.text("size", 100)
    if text is None or text == _AUTO:
        return made_for(manifest)[0]
    match = _SIZE.fullmatch(text)
    if not match:
        raise invalid("size", f"size: expected auto or for example 512x512, got {shorten(text)}")
    size = Size(int(match[1]), int(match[2]))
    if min(size) < 1 or size.width * size.height > most or max(size) > 2**14:
        raise invalid("size", f"size: expected at most {most:,} pixels and {2**14:,} a side, at least 1, got {size}")
    return size


def _quality(fields: _Fields, format: Format) -> int | None:
    if fields.get("output_compression") is None:
        return None
    quality = fields.integer("output_compression", 0, 100, 100)
    if format == "png":
        if quality != 100:
            raise invalid("output_compression", "output_compression is for jpeg and webp; png loses nothing")
        return None
    return max(quality, 1)


class _Fields:
    """The fields of a request by name. Errors name the field."""

    def __init__(self, content: Mapping[str, Any], form: bool) -> None:
        self._content = content
        self._form = form

    def refuse_others(self) -> None:
        """Raise ApiError if a field is unknown."""
        for name in self._content:
            if name in _FIELDS:
                continue
            lesson = LESSONS.get(name)
            shown = clip(name)
            message = f"{shown}: {lesson}" if lesson else f"unknown parameter: {shown!r}"
            raise invalid(shown, message, "unknown_parameter")

    def get(self, name: str) -> Any:
        """Return a value as it came."""
        return self._content.get(name)

    def choice(self, name: str, values: Sequence[str], default: str, code: str = "invalid_value") -> str:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in values:
            raise invalid(name, f"{name}: expected one of {', '.join(values)}, got {shorten(value)}", code)
        return value

    def text(self, name: str, most: int) -> str | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        if len(value) > most:
            raise invalid(name, f"{name}: expected at most {most:,} characters, got {len(value):,}", "string_too_long")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise invalid(name, f"{name}: expected whole characters, got half of one") from error
        return value

    def integer(self, name: str, least: int, most: int, default: int) -> int:
        value = self._parsed(name, int)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "an integer", value)
        if not least <= value <= most:
            raise invalid(name, f"{name}: expected an integer from {least} to {most}, got {shorten(value)}")
        return value

    def number(self, name: str, most: float) -> float:
        """Return a number greater than 0; `most` if it is absent."""
        value = self._parsed(name, float)
        if value is None:
            return most
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number", value)
        if not 0 < value <= most:
            raise invalid(name, f"{name}: expected more than 0 and at most {most:g}, got {shorten(value)}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if self._form and isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower(), value)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def _parsed(self, name: str, kind: Callable[[str], float]) -> Any:
        value = self.get(name)
        pattern = _INTEGER if kind is int else _NUMBER
        return kind(value) if self._form and isinstance(value, str) and pattern.fullmatch(value) else value

    @staticmethod
    def _wrong(name: str, expected: str, value: object) -> ApiError:
        return invalid(name, f"{name}: expected {expected}, got {shorten(value)}", "invalid_type")
