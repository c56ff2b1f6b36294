"""Videos that users send: to a temporary file, of limited size, seen by FFmpeg's demuxers for videos alone."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request

from emcl.serve.desk import BusyError
from emcl.serve.limits import Limits

TYPES = ("application/octet-stream",)
"""Besides video/*."""
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The bytes of a video file, in any format that FFmpeg reads.",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary", "minLength": 1}} for kind in ("video/mp4", *TYPES)
        },
    }
}
"""For OpenAPI."""


@dataclass(frozen=True)
class Upload:
    path: Path
    digest: str
    """SHA-256 of its content."""


class Uploads:
    """Receives videos, so many at once."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.here = limits, 0

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[Upload]:
        """The body as a file, which is gone afterwards.

        Raises:
            HTTPException: 415 no video's type, 413 too large, 400 nothing sent.
            BusyError: too many at once.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith("video/") and kind not in TYPES:
            raise HTTPException(415, "send the video's bytes as Content-Type: video/mp4 (or another video/...)")
        if self.here >= self.limits.uploads:
            raise BusyError
        self.here += 1
        try:
            with tempfile.NamedTemporaryFile(prefix="emcl-upload-") as file:
                digest = await self._copy(request, file)
                yield Upload(Path(file.name), digest)
        finally:
            self.here -= 1

    async def _copy(self, request: Request, file: Any) -> str:
        said = request.headers.get("content-length", "0")
        if said.isdigit() and int(said) > self.limits.upload_bytes:
            raise self._too_large()
        digest, size = hashlib.sha256(), 0
        async for part in request.stream():
            size += len(part)
            if size > self.limits.upload_bytes:
                raise self._too_large()
            digest.update(part)
            file.write(part)
        if not size:
            raise HTTPException(400, "the body is empty: send the video's bytes")
        file.flush()
        return digest.hexdigest()

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"a video may have {self.limits.upload_mib:g} MiB (emcl serve --max-upload)")
