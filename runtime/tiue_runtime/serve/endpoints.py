"""What each address of the server does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from tiue_runtime.serve.answers import JsonAnswer, answer, as_base64, encoded, revised_prompt
from tiue_runtime.serve.api_errors import GONE, ApiError, as_api_error
from tiue_runtime.serve.bodies import parse_body, read_body
from tiue_runtime.serve.guard import PICTURES
from tiue_runtime.serve.image_request import ImageRequest, read_request
from tiue_runtime.serve.image_stream import ImageStream
from tiue_runtime.serve.jobs import Drawn, Job, JobQueue
from tiue_runtime.serve.kept_pictures import KeptPictures
from tiue_runtime.serve.nearest_size import made_for
from tiue_runtime.serve.serve_metrics import ServeMetrics
from tiue_runtime.serve.server_settings import ServerSettings
from tiue_runtime.tokenizer import PromptTokenizer

PAGE = Path(__file__).parent / "page"
# The page loads its own files only, and no other page may frame it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


class Endpoints:
    """The addresses, and what they share. Queues come by the name of their model, the default first."""

    def __init__(self, queues: Mapping[str, JobQueue], settings: ServerSettings, metrics: ServeMetrics) -> None:
        self.queues, self.settings, self.metrics = queues, settings, metrics
        self.warm = False  # whether each model has drawn a picture
        self.ending = False
        self._manifests = {name: queue.pipeline.bundle.manifest for name, queue in queues.items()}
        self._tokenizers = {
            name: PromptTokenizer(queue.pipeline.bundle.tokenizer_path, self._manifests[name].text_length)
            for name, queue in queues.items()
        }
        self._kept = KeptPictures(settings.kept_pictures, settings.kept_bytes, settings.kept_seconds)

    async def generate(self, request: Request) -> Response:
        """POST /v1/images/generations: draw pictures."""
        settings = self.settings
        body = await read_body(request, settings.most_body, settings.body_seconds)
        content, form = await parse_body(request, body)
        wanted = read_request(content, self._manifests, settings, form=form)
        queue, name = self.queues[wanted.model], request.state.request_id
        waited = partial(self.metrics.waited, wanted.model)
        tokens = int(self._tokenizers[wanted.model]([wanted.drawing.prompt]).attention_mask.sum())
        try:
            if wanted.stream:
                return ImageStream(queue, name, wanted, tokens, metadata=settings.metadata, waited=waited)
            job = queue.submit(wanted.drawing, id=name)
            drawn = await self._result(request, queue, job)
            data = [await self._picture(request, picture, wanted) for picture in drawn.pictures] if drawn else []
        except Exception as error:
            raise as_api_error(error) from error
        if drawn is None:
            return Response(status_code=GONE)
        waited(drawn.timings["waiting"])
        return JsonAnswer(answer(wanted, data, drawn.timings, tokens, list(drawn.warnings)))

    async def _result(self, request: Request, queue: JobQueue, job: Job) -> Drawn | None:
        """Wait for a job. Returns None, and cancels the job, if the client hangs up."""
        drawn = asyncio.ensure_future(asyncio.wrap_future(job.future))
        gone = asyncio.create_task(_until_gone(request))
        try:
            await asyncio.wait((drawn, gone), return_when=asyncio.FIRST_COMPLETED)
            return drawn.result() if drawn.done() else None
        finally:
            queue.cancel(job)  # does nothing if the job has ended
            gone.cancel()
            drawn.cancel()
            await asyncio.wait((drawn, gone))
            if not drawn.cancelled():
                drawn.exception()  # Without this, asyncio would log an error that nobody asked for.

    async def _picture(self, request: Request, picture: Any, wanted: ImageRequest) -> dict[str, str]:
        revised = revised_prompt(picture, wanted)
        if not wanted.as_url:
            data = await asyncio.to_thread(as_base64, picture, wanted, metadata=self.settings.metadata)
            return {"b64_json": data, **revised}
        data = await asyncio.to_thread(encoded, picture, wanted, metadata=self.settings.metadata)
        name = self._kept.keep(data, wanted.format)
        return {"url": str(request.url.replace(path=PICTURES + name, query="", fragment="")), **revised}

    async def picture(self, request: Request) -> Response:
        """GET /v1/pictures/{name}: a picture that an answer named by its URL."""
        kept = self._kept.get(request.path_params["name"])
        if kept is None:
            raise ApiError(404, "there is no such picture, or not any more", code="picture_not_found")
        return Response(kept.data, media_type=kept.media_type)

    async def edit(self, request: Request) -> Response:
        """POST /v1/images/edits and /variations: refused."""
        await read_body(request, self.settings.most_body, self.settings.body_seconds)
        message = "a student makes pictures from noise and a prompt only: it knows neither edits nor variations"
        raise ApiError(400, message, code="unsupported_endpoint")

    async def models(self, _: Request) -> Response:
        """GET /v1/models: the models that this server draws with."""
        return JsonAnswer({"object": "list", "data": [_model(name) for name in self.queues]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}: one model, with what its bundle says of it."""
        name = request.path_params["name"]
        manifest = self._manifests.get(name)
        if manifest is None:
            raise ApiError(404, "this server has no such model", param="model", code="model_not_found")
        prompts = manifest.prompts
        facts = {
            "license": manifest.license,
            "steps": sorted(manifest.schedules),
            "default_steps": manifest.default_steps,
            "sizes": [str(size) for size in made_for(manifest)],
            "examples": list(prompts.examples) if prompts else [],
            "device": self.queues[name].pipeline.device,
            "most_pictures": self.settings.most_pictures,
        }
        return JsonAnswer({**_model(name), "tiue": facts})

    async def job(self, request: Request) -> Response:
        """GET /v1/jobs/{id}: how far a job is. DELETE cancels it, and its request is answered with an error."""
        queue, job = self._find(request)
        if request.method == "DELETE":
            cancelled = queue.cancel(job.id)
            return JsonAnswer({"id": job.id, "object": "job", "status": job.state, "cancelled": cancelled})
        drawing = job.drawing
        content = {
            "id": job.id,
            "object": "job",
            "status": job.state,
            "progress": round(job.fraction, 4),
            "stage": job.stage,
            "pictures": drawing.count if job.state == "done" else len(job.pictures),
            "of": drawing.count,
            "ahead": queue.position(job),
            "created_at": int(job.created),
        }
        return JsonAnswer(content)

    def _find(self, request: Request) -> tuple[JobQueue, Job]:
        """Return the job of an id, and its queue. Of several models' jobs, one that has not ended, or the latest."""
        jobs = [(queue, queue.job(request.path_params["id"])) for queue in self.queues.values()]
        found = [(queue, job) for queue, job in jobs if job is not None]
        if not found:
            raise ApiError(404, "there is no such job, or not any more", param="id", code="job_not_found")
        return max(found, key=lambda each: (each[1].state in ("waiting", "running"), each[1].created))

    async def health(self, _: Request) -> Response:
        """GET /health: the process answers."""
        return JsonAnswer({"status": "ok"})

    async def is_ready(self, _: Request) -> Response:
        """GET /ready: whether requests are drawn now."""
        if self.ending or not self.warm:
            return JsonAnswer({"status": "ending" if self.ending else "starting"}, 503)
        return JsonAnswer({"status": "ready"})

    async def figures(self, _: Request) -> Response:
        """GET /metrics: figures for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, _: Request) -> Response:
        """GET /: the page."""
        index = PAGE / "index.html"
        if not index.is_file():
            raise ApiError(404, "this server has no page; POST to /v1/images/generations", code="not_found")
        return FileResponse(index, headers={"cache-control": "no-cache", "content-security-policy": _POLICY})


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "tiue"}


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
