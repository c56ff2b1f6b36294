"""Headers that keep a page to itself, and the names a server on this machine alone may be called by."""

from __future__ import annotations

from typing import Any

from emcl.serve.asgi import watched

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
"""FastAPI's page of the API loads its script from elsewhere; it shows nothing of the index."""


class Headers:
    """On every answer: nothing is loaded from elsewhere, nor shown within other pages."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        def add(message: Any) -> None:
            policy = [] if scope["path"].startswith(_DESCRIPTION) else [(b"content-security-policy", _POLICY.encode())]
            message["headers"] = [*message["headers"], *_HEADERS, *policy]

        await self.app(scope, receive, watched(send, add))
