"""What a server takes from its users."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    waiting: int = 128
    """Requests that may wait for the model; more are told to come back (503)."""
    uploads: int = 16
    """Videos that are being sent or worked on at once."""
    upload_mib: float = 200
    """Of a video that is sent."""
    kept: int = 64
    """Sent videos whose embeddings are kept, so that a caption after a search does not encode them again."""

    @property
    def upload_bytes(self) -> int:
        return int(self.upload_mib * MIB)
