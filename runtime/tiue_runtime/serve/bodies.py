"""The bodies of requests: read up to a limit, then parsed as JSON or as a form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast
from urllib.parse import unquote_to_bytes

from starlette.datastructures import FormData
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from tiue_runtime.bundle.fields import parse_json
from tiue_runtime.errors import BundleError, shorten
from tiue_runtime.serve.api_errors import GONE, ApiError, invalid

_JSON = "application/json"
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_MOST_FIELDS = 100
_DEEPEST = 32  # levels of JSON


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """Return the body of a request, whether or not it announces its length. `most` counts bytes.

    Raises:
        ApiError: it is too large or too slow, or the client hung up.
    """
    refusal = ApiError(
        413,
        f"the request's body has more than {most:,} bytes, which is the limit of this server",
        code="body_too_large",
        headers={"connection": "close"},
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > most:
        raise refusal
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise refusal
    except ClientDisconnect as error:
        raise ApiError(GONE, "the client hung up", code="client_gone") from error
    except TimeoutError as error:
        message = f"the request's body did not arrive within {seconds:g} seconds"
        raise ApiError(408, message, code="body_too_slow", headers={"connection": "close"}) from error
    return bytes(body)


async def parse_body(request: Request, body: bytes) -> tuple[dict[str, Any], bool]:
    """Return the fields of a body, and whether it is a form, whose values are strings. Otherwise it is JSON.

    Raises:
        ApiError: the body is of another type, or damaged.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _JSON:
        return _json(body), False
    if kind in _FORMS:
        if body.lstrip().startswith(b"{"):
            raise ApiError(415, f"the body looks like JSON: send it with content-type: {_JSON}", code="content_type")
        return await _form(request, body, kind), True
    expected = ", ".join((_JSON, *_FORMS))
    message = f"content-type: expected one of {expected}, got {shorten(kind)}"
    raise ApiError(415, message, code="content_type")


def _json(body: bytes) -> dict[str, Any]:
    try:
        content = parse_json(body)
    except BundleError as error:
        raise invalid(None, f"the body cannot be read: {error}", "invalid_json") from error
    if not isinstance(content, dict):
        raise invalid(None, f"expected a JSON object, got {shorten(content)}", "invalid_json")
    fields = cast(dict[str, Any], content)
    if not _shallow(fields):
        raise invalid(None, "expected JSON of a few levels, but it is nested too deeply", "invalid_json")
    return fields


def _shallow(content: object) -> bool:
    """Say whether a JSON value has at most _DEEPEST levels. Messages show values, which takes a stack frame a level."""
    level: list[object] = [content]
    for _ in range(_DEEPEST):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (cast(dict[str, object], value).values() if isinstance(value, dict) else cast(Any, value))
        ]
    return not level


async def _form(request: Request, body: bytes, kind: str) -> dict[str, Any]:
    async def stream() -> AsyncGenerator[bytes]:
        yield body
        yield b""

    multipart = kind == _FORMS[0]
    try:
        (body if multipart else unquote_to_bytes(body)).decode()  # The parsers would replace what is not UTF-8.
        if multipart:
            parser: Any = MultiPartParser(request.headers, stream(), max_files=0, max_fields=_MOST_FIELDS)
        else:
            parser = FormParser(request.headers, stream())
        form: FormData = await parser.parse()
    except (MultiPartException, KeyError, ValueError, ClientDisconnect) as error:  # KeyError: no boundary
        message = "the form cannot be read: it is damaged, not UTF-8, or holds a file"
        raise invalid(None, message, "invalid_form") from error
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise invalid(name[:100], f"{shorten(name)} is given twice", "invalid_form")
        fields[name] = value
    return fields
