"""What the server's middlewares share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def watched(send: Any, started: Callable[[Any], None]) -> Any:
    """`send`, which shows an answer's first message, with its status and headers, to `started`."""

    async def noted(message: Any) -> None:
        if message["type"] == "http.response.start":
            started(message)
        await send(message)

    return noted
