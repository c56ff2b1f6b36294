"""The server's metrics for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import generate_latest as text_of

from emcl.serve.asgi import HttpMiddleware, watched


class Metrics:
    """Requests by route and status, their seconds, the number that wait for the model, the process's memory."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, *, waiting: Callable[[], int], windows: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("emcl_requests", "Requests", ["route", "status"], registry=registry)
        self.seconds = Histogram("emcl_request_seconds", "Seconds of a request", ["route"], registry=registry)
        Gauge("emcl_waiting", "Requests at the model or waiting", registry=registry).set_function(waiting)
        Gauge("emcl_windows", "Indexed windows", registry=registry).set_function(windows)
        ProcessCollector(registry=registry)

    def text(self) -> bytes:
        return text_of(self._registry)

    def middleware(self) -> Any:
        """An ASGI middleware that counts."""
        metrics = self

        class Counted(HttpMiddleware):
            async def respond(self, scope: Any, receive: Any, send: Any) -> None:
                seen, began = {"status": 500}, time.perf_counter()
                try:
                    await self.app(scope, receive, watched(send, seen.update))
                finally:  # labelled by route, not by path, to keep the number of labels small
                    route = getattr(scope.get("route"), "path", "other")
                    metrics.requests.labels(route, seen["status"]).inc()
                    metrics.seconds.labels(route).observe(time.perf_counter() - began)

        return Counted
