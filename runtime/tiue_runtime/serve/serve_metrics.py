"""Figures for Prometheus: requests, the queue, seconds of each stage, memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from starlette.types import Scope

    from tiue_runtime.serve.jobs import JobQueue

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServeMetrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        counter = partial(Counter, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry, buckets=_BUCKETS)
        self._requests = counter("tiue_requests", "Answered requests.", ["endpoint", "status"])
        self._seconds = histogram("tiue_request_seconds", "From a request to its answer's end.", ["endpoint"])
        stages = "Each graph, and total; one request of the pipeline."
        self._stages = histogram("tiue_stage_seconds", stages, ["model", "stage"])
        self._waited = histogram("tiue_wait_seconds", "In the queue, of finished requests.", ["model"])
        self._pictures = counter("tiue_pictures", "Drawn pictures.", ["model"])

    def watch(self, queues: Mapping[str, JobQueue]) -> None:
        """Report the lengths of queues, by model."""
        self._registry.register(_Queues(queues))

    def request(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request. Addresses that do not exist count together."""
        endpoint = scope.get("endpoint")
        name = getattr(endpoint, "__name__", "page" if endpoint else "none")
        self._requests.labels(name, str(status or 499)).inc()
        self._seconds.labels(name).observe(seconds)

    def drawn(self, model: str, timings: Mapping[str, float], pictures: int) -> None:
        """Count pictures that were drawn together."""
        self._pictures.labels(model).inc(pictures)
        for stage, seconds in timings.items():
            self._stages.labels(model, stage).observe(seconds)

    def waited(self, model: str, seconds: float) -> None:
        """Count the time that a job waited."""
        self._waited.labels(model).observe(seconds)

    def text(self) -> bytes:
        """Return the figures as Prometheus reads them."""
        return generate_latest(self._registry)


class _Queues(Collector):
    def __init__(self, queues: Mapping[str, JobQueue]) -> None:
        self._queues = queues

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("tiue_queue_waiting", "Requests that wait.", labels=["model"])
        running = GaugeMetricFamily("tiue_queue_running", "Requests that are drawn.", labels=["model"])
        for name, queue in self._queues.items():
            waiting.add_metric([name], queue.waiting)
            running.add_metric([name], queue.running)
        yield waiting
        yield running
