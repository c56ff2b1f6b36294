"""A helper of the server's ASGI middlewares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def watched(send: Any, started: Callable[[Any], None]) -> Any:
    """Wraps `send`: passes a response's first message, with its status and headers, to `started` before sending it."""

    async def noted(message: Any) -> None:
        if message["type"] == "http.response.start":
            started(message)
        await send(message)

    return noted
