"""What the server's ASGI middlewares have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class HttpMiddleware:
    """Base class: `respond` gets HTTP requests; anything else, such as start and end of the server, passes by."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await (self.respond if scope["type"] == "http" else self.app)(scope, receive, send)

    async def respond(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI's call, for a request; calls `self.app`."""
        raise NotImplementedError


def watched(send: Any, started: Callable[[Any], None]) -> Any:
    """Wraps `send`: passes a response's first message, with its status and headers, to `started` before sending it."""

    async def noted(message: Any) -> None:
        if message["type"] == "http.response.start":
            started(message)
        await send(message)

    return noted
