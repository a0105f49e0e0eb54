"""The application: routes, layers, and the life of its queues."""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from tiue_runtime.errors import Cancelled, RequestError
from tiue_runtime.serve.server_settings import ServerSettings, as_sent, missing

try:
    import prometheus_client as _prometheus  # pyright: ignore[reportUnusedImport]  # noqa: F401
    import python_multipart as _multipart  # pyright: ignore[reportUnusedImport]  # noqa: F401
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
except ImportError as error:
    raise missing(error) from error

from tiue_runtime.ort.devices import parse_device
from tiue_runtime.serve.api_errors import LOG, ApiError
from tiue_runtime.serve.endpoints import PAGE, Endpoints
from tiue_runtime.serve.guard import Inner, Outer, error_answer
from tiue_runtime.serve.jobs import Drawing, JobQueue, QueueClosed
from tiue_runtime.serve.serve_metrics import ServeMetrics

if TYPE_CHECKING:
    from tiue_runtime.pipeline import Pipeline

_BATCH_ON_GPU = 4


def create_app(pipelines: Mapping[str, Pipeline], settings: ServerSettings | None = None) -> Starlette:
    """Make the application.

    Its state holds `endpoints` and `queues`. The queues begin now, and end with the application's lifespan.

    Args:
        pipelines: by the name of the model, the default first. They stay the caller's, who closes them afterwards.
        settings: limits and permissions. None: the defaults.

    Raises:
        RequestError: there is no pipeline, or a setting is wrong.
    """
    if not pipelines:
        raise RequestError("pipelines: expected at least one model, got none")
    settings = settings or ServerSettings()
    metrics = ServeMetrics()
    queues = {
        name: JobQueue(
            pipeline,
            most=settings.most_waiting,
            batch=settings.batch or (_BATCH_ON_GPU if parse_device(pipeline.device).is_gpu else 1),
            on_drawn=partial(metrics.drawn, name),
        )
        for name, pipeline in pipelines.items()
    }
    metrics.watch(queues)
    endpoints = Endpoints(queues, settings, metrics)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        first = asyncio.create_task(_draw_first(endpoints))
        yield
        endpoints.ending = True
        for queue in queues.values():
            queue.close()
        await first

    app = Starlette(
        routes=_routes(endpoints),
        middleware=_layers(settings, metrics),
        exception_handlers={ApiError: _refuse, HTTPException: _refuse_route},  # pyright: ignore[reportArgumentType]
        lifespan=lifespan,
    )
    app.state.endpoints, app.state.queues = endpoints, queues
    return app


async def _draw_first(endpoints: Endpoints) -> None:
    """Draw a picture with each model and discard it. Then the server is ready: requests are quick from now on."""
    try:
        jobs = [queue.submit(Drawing("", seed=0)) for queue in endpoints.queues.values()]
        await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    except (Cancelled, QueueClosed):
        return  # The server ends.
    except Exception:
        LOG.exception("the server is not ready, because a model cannot draw")
        return
    endpoints.warm = True


def _routes(endpoints: Endpoints) -> list[Route | Mount]:
    routes: list[Route | Mount] = [
        Route("/v1/images/generations", endpoints.generate, methods=["POST"]),
        Route("/v1/images/edits", endpoints.edit, methods=["POST"]),
        Route("/v1/images/variations", endpoints.edit, methods=["POST"]),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.model),
        Route("/v1/jobs/{id}", endpoints.job, methods=["GET", "DELETE"]),
        Route("/v1/pictures/{name}", endpoints.picture),
        Route("/health", endpoints.health),
        Route("/ready", endpoints.is_ready),
        Route("/metrics", endpoints.figures),
        Route("/", endpoints.page),
    ]
    if PAGE.is_dir():
        mimetypes.add_type("text/javascript", ".js")  # The registry of Windows may say text/plain: browsers refuse it.
        routes.append(Mount("/page", StaticFiles(directory=PAGE)))
    return routes


def _layers(settings: ServerSettings, metrics: ServeMetrics) -> list[Middleware]:
    layers: list[Any] = [Middleware(Outer, settings=settings, metrics=metrics)]
    if settings.origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=[as_sent(origin) for origin in settings.origins],
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],  # Clients of OpenAI send many of their own.
                expose_headers=["x-request-id", "x-should-retry", "retry-after"],
            )
        )
    layers.append(Middleware(Inner, settings=settings))
    return layers


async def _refuse(_: Request, error: ApiError) -> Response:
    return error_answer(error)


async def _refuse_route(_: Request, error: HTTPException) -> Response:
    messages = {
        404: ("there is no such address", "not_found"),
        405: ("this address does not take this method", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, ("the request was refused", "refused"))
    return error_answer(ApiError(error.status_code, message, code=code, headers=error.headers))
