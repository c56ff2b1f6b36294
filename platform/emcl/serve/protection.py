"""Security headers, and the host names that a server on the loopback address accepts."""

from __future__ import annotations

from typing import Any

from emcl.serve.asgi import HttpMiddleware, watched

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_DESCRIPTION = "/docs"
"""FastAPI's API page loads scripts from another host, so it gets no policy; it shows no data of the index."""


class Headers(HttpMiddleware):
    """Adds headers to every response: pages load nothing from other hosts and cannot be framed by other pages."""

    async def respond(self, scope: Any, receive: Any, send: Any) -> None:
        def add(message: Any) -> None:
            policy = [] if scope["path"].startswith(_DESCRIPTION) else [(b"content-security-policy", _POLICY.encode())]
            message["headers"] = [*message["headers"], *_HEADERS, *policy]

        await self.app(scope, receive, watched(send, add))
