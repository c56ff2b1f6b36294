"""Receives videos from users: size-limited, to a temporary file, and opened only by FFmpeg's video demuxers."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request

from emcl.serve.request_limits import Limits
from emcl.serve.work_queue import BusyError

TYPES = ("application/octet-stream",)
"""Accepted content types besides video/*."""
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The bytes of a video file, in any format that FFmpeg reads.",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary", "minLength": 1}} for kind in ("video/mp4", *TYPES)
        },
    }
}
"""The request body in OpenAPI."""


@dataclass(frozen=True)
class Upload:
    path: Path
    digest: str
    """SHA-256 of the content."""


class Uploads:
    """Receives videos, at most `limits.uploads` at the same time."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.here = limits, 0

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[Upload]:
        """Stores the body in a file, which is deleted afterwards.

        Raises:
            HTTPException: 415 not a video type, 413 too large, 400 empty body.
            BusyError: too many uploads at the same time.
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
        async for chunk in request.stream():
            size += len(chunk)
            if size > self.limits.upload_bytes:
                raise self._too_large()
            digest.update(chunk)
            file.write(chunk)
        if not size:
            raise HTTPException(400, "the body is empty: send the video's bytes")
        file.flush()
        return digest.hexdigest()

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"a video may have {self.limits.upload_mib:g} MiB (emcl serve --max-upload)")
