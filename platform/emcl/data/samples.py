"""The one sample schema: `KEY.mp4` and `KEY.json` in a plain WebDataset tar, for all tasks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from emcl.errors import UserError

VIDEO_ENDINGS = ("mp4", "avi", "mkv", "webm", "mov", "m4v", "mpg", "mpeg", "wmv", "flv")
"""An allow-list: nothing else in a shard is ever decoded, least of all a pickle."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a shard's JSON says of a video."""

    id: str
    source: str = ""
    split: str = ""
    captions: list[str] = field(default_factory=list)
    qa: list[dict[str, str]] = field(default_factory=list)
    start: float | None = None
    """Seconds; the part of the file that the sample is, or None for all of it."""
    end: float | None = None

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True).encode()

    @staticmethod
    def from_json(text: bytes, where: str) -> Sample:
        """Raises UserError where `text` is not an object of this schema; `where` names it."""
        try:
            raw: Any = json.loads(text)
            known = {key: raw[key] for key in Sample.__dataclass_fields__ if key in raw}
            return Sample(**known)
        except (ValueError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: not a sample's JSON ({error}); write shards with `emcl prepare`") from None
