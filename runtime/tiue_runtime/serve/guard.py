"""Who may ask: the Host header, the origin of pages, the API key. Pure ASGI, so that streams pass unchanged."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiue_runtime.errors import shorten
from tiue_runtime.serve.answers import JsonAnswer
from tiue_runtime.serve.api_errors import LOG, ApiError
from tiue_runtime.serve.server_settings import as_sent

if TYPE_CHECKING:
    from tiue_runtime.serve.serve_metrics import ServeMetrics
    from tiue_runtime.serve.server_settings import ServerSettings

PICTURES = "/v1/pictures/"
"""The addresses of kept pictures. Their names are secrets themselves."""

_OPEN = ("/", "/health", "/ready")  # without a key
_OPEN_FOLDERS = ("/page/", PICTURES)
_SAFE = ("GET", "HEAD", "OPTIONS")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]/@?#\s]+)(?::[0-9]{1,5})?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")


def error_answer(error: ApiError) -> JsonAnswer:
    """Return the answer of an error."""
    headers = dict(error.headers)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JsonAnswer(error.body(), error.status, headers)


class Outer:
    """The outermost layer: the request's id, the Host header, safe headers, figures, and errors nobody expected."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: ServeMetrics) -> None:
        self._app, self._metrics = app, metrics
        self._hosts = {"localhost", *(host.strip("[]").rstrip(".").lower() for host in settings.hosts)}
        self._shared = bool(settings.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = name

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
                headers["cross-origin-resource-policy"] = "cross-origin" if self._shared else "same-origin"
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            self._check_host(Headers(scope=scope).getlist("host"))
            await self._app(scope, receive, send_with_headers)
        except ApiError as error:
            await error_answer(error)(scope, receive, send_with_headers)
        except Exception:
            LOG.exception("request %s failed", name)
            if status:
                raise  # The answer has begun: the connection is cut.
            error = ApiError(500, "the server failed; its log says why", code="internal_error")
            await error_answer(error)(scope, receive, send_with_headers)
        finally:
            self._metrics.request(scope, status, time.perf_counter() - begun)

    def _check_host(self, hosts: list[str]) -> None:
        """Refuse names that are not ours: a page elsewhere could have its own name lead to this machine."""
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        name = match[1].strip("[]").removesuffix(".").lower() if match else ""
        if name in self._hosts or _is_address(name):
            return
        shown = shorten(hosts[0]) if hosts else "none"
        message = f"host: this server does not answer for {shown}; its operator can allow a name with --allow-host"
        raise ApiError(403, message, code="host_not_allowed")


class Inner:
    """The layer within CORS: origins of pages, and the API key."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._origins = {as_sent(origin) for origin in settings.origins}
        self._key = None if settings.api_key is None else hashlib.sha256(settings.api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            try:
                headers = Headers(scope=scope)
                if scope["method"] not in _SAFE:
                    self._check_origin(headers)
                if self._key is not None and not _is_open(scope):
                    self._check_key(headers)
            except ApiError as error:
                await error_answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_origin(self, headers: Headers) -> None:
        """Refuse what a page of another origin sends. Browsers name the origin; other programs do not."""
        origin = headers.get("origin")
        if origin is None:
            foreign = headers.get("sec-fetch-site", "none") in ("cross-site", "same-site")
        else:
            foreign = origin.lower() not in self._origins and _netloc(origin) != headers["host"].lower()
        if foreign:
            shown = shorten(origin or "others")
            message = f"origin: pages of {shown} may not draw; the operator can allow them: --allow-origin"
            raise ApiError(403, message, code="origin_not_allowed")

    def _check_key(self, headers: Headers) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self._key or b""):
            message = "this server asks for an API key: send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] in _SAFE and (path in _OPEN or path.startswith(_OPEN_FOLDERS))


def _is_address(name: str) -> bool:
    """Say whether a host is an IP address. A page cannot make an address lead elsewhere, as it can with names."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
