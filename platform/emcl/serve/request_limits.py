"""Limits on the requests that a server accepts."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    waiting: int = 128
    """Requests that may wait for the model; further ones get a 503."""
    uploads: int = 16
    """Videos that may be received or processed at the same time."""
    upload_mib: float = 200
    """Largest size of a sent video in MiB."""
    kept: int = 64
    """Sent videos whose embeddings are cached, so that a caption after a search does not encode them again."""

    @property
    def upload_bytes(self) -> int:
        return int(self.upload_mib * MIB)
