"""Errors as clients of OpenAI's API know them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tiue_runtime.errors import Cancelled, OutOfMemoryError, RequestError
from tiue_runtime.serve.jobs import Late, QueueClosed, QueueFull

GONE = 499  # the status in figures of a client that hung up; nobody receives it
LOG = logging.getLogger("tiue_runtime.serve")
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that says what is wrong.

    Args:
        status: of HTTP.
        message: for people. It must name no file of this machine.
        param: the field of the request that is wrong.
        code: for programs.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """Return the error of a wrong field."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException) -> ApiError:
    """Turn an error of a job into an answer. Messages of unexpected errors stay in the log: they may name files."""
    no_retry = {"x-should-retry": "false"}
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        headers = {"retry-after": str(min(max(round(error.seconds), 1), 600))}
        return ApiError(429, str(error), code="queue_full", headers=headers)
    if isinstance(error, QueueClosed):
        return ApiError(503, str(error), code="shutting_down", headers={"retry-after": "5"})
    if isinstance(error, Late):
        return ApiError(504, str(error), param="timeout", code="timeout", headers=no_retry)
    if isinstance(error, Cancelled):
        return ApiError(409, str(error), code="cancelled", headers=no_retry)
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=_param(str(error)), code="invalid_value")
    LOG.error("drawing failed", exc_info=error)
    if isinstance(error, OutOfMemoryError | MemoryError):
        message = "there is not enough memory for these pictures; ask for smaller ones, or for fewer"
        return ApiError(503, message, code="out_of_memory", headers=no_retry)
    return ApiError(500, "drawing failed; the log of the server says why", code="drawing_failed", headers=no_retry)


def _param(message: str) -> str | None:
    """Return the field of a request that an error of the library names first."""
    name = message.partition(":")[0]
    names = {"num_images": "n", "height": "size", "width": "size", "id": "x-request-id"}
    first = name.split(",")[0]
    return names.get(first, first) if first.isidentifier() else None
