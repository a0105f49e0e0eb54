"""Answers: JSON in ASCII, pictures as files, and the events of a stream."""

from __future__ import annotations

import base64
import io
import json
import time
from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from starlette.responses import Response

from tiue_runtime.serve.nearest_size import resized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tiue_runtime.serve.image_request import ImageRequest


class JsonAnswer(Response):
    """JSON in ASCII. Escapes stand for everything else, so halves of characters do no harm."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return _json(content)


def encoded(picture: Image, wanted: ImageRequest, *, metadata: bool) -> bytes:
    """Return a picture's file, in the size and the format of the request, and with its record if `metadata` is true.

    The mark "made by AI" is always there.
    """
    file = io.BytesIO()
    options: dict[str, Any] = {} if wanted.quality is None else {"quality": wanted.quality}
    save: Any = resized(picture, wanted.size).save
    save(file, wanted.format.upper(), metadata=metadata, **options)
    return file.getvalue()


def as_base64(picture: Image, wanted: ImageRequest, *, metadata: bool) -> str:
    """Return a picture's file, as `encoded` does, in base64."""
    return base64.b64encode(encoded(picture, wanted, metadata=metadata)).decode("ascii")


def revised_prompt(picture: Image, wanted: ImageRequest) -> dict[str, str]:
    """Return OpenAI's field for a prompt to which a style was added, or nothing."""
    drawn: str | None = getattr(getattr(picture, "record", None), "prompt", None)
    return {} if drawn in (None, wanted.drawing.prompt) else {"revised_prompt": drawn}


def usage(text_tokens: int) -> dict[str, Any]:
    """Return the `usage` of an answer. A student reads tokens; its pictures are not made of any."""
    return {
        "input_tokens": text_tokens,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": 0},
        "output_tokens": 0,
        "total_tokens": text_tokens,
    }


def answer(
    wanted: ImageRequest, data: list[dict[str, str]], timings: Mapping[str, float], tokens: int, warnings: list[str]
) -> dict[str, Any]:
    """Return the JSON object of a finished request."""
    return {
        "created": int(time.time()),
        "data": data,
        "size": str(wanted.size),
        "output_format": wanted.format,
        "usage": usage(tokens),
        "tiue": {**_facts(wanted, timings, warnings), "seeds": _seeds(wanted)},
    }


def partial_event(wanted: ImageRequest, image: str, number: int, index: int) -> bytes:
    """Return the event of a picture that is not finished: the image in base64, and the event's number, from 0."""
    kind = "image_generation.partial_image"
    return event(kind, {**_described(wanted, image), "partial_image_index": number, "tiue": {"index": index}})


def completed_event(
    wanted: ImageRequest,
    image: str,
    index: int,
    timings: Mapping[str, float],
    tokens: int,
    warnings: list[str],
    **more: str,
) -> bytes:
    """Return the event of a finished picture."""
    facts = {**_facts(wanted, timings, warnings), "index": index, "seeds": [_seeds(wanted)[index]], **more}
    content = {**_described(wanted, image), "usage": usage(tokens), "tiue": facts}
    return event("image_generation.completed", content)


def event(kind: str, content: Mapping[str, Any]) -> bytes:
    """Return an event of a stream."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode("ascii"), _json({"type": kind, **content}))


def error_event(body: Mapping[str, Any]) -> bytes:
    """Return an error in a stream, which then ends."""
    return b"data: %b\n\n" % _json(body)


def _json(content: object) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def _described(wanted: ImageRequest, image: str) -> dict[str, Any]:
    return {
        "b64_json": image,
        "created_at": int(time.time()),
        "size": str(wanted.size),
        "quality": "auto",
        "background": "opaque",
        "output_format": wanted.format,
    }


def _seeds(wanted: ImageRequest) -> list[int]:
    return [wanted.drawing.seed + i for i in range(wanted.drawing.count)]


def _facts(wanted: ImageRequest, timings: Mapping[str, float], warnings: list[str]) -> dict[str, Any]:
    return {
        "timings": {stage: round(seconds, 6) for stage, seconds in timings.items()},
        "bundle": wanted.model,
        "drawn_size": f"{wanted.drawing.width}x{wanted.drawing.height}",
        **({"warnings": warnings} if warnings else {}),
    }
