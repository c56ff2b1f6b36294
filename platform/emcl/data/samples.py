"""The one sample schema: `KEY.mp4` and `KEY.json` in a plain WebDataset tar, for all tasks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from emcl.errors import UserError

VIDEO_ENDINGS = ("mp4", "avi", "mkv", "webm", "mov", "m4v", "mpg", "mpeg", "wmv", "flv")
"""An allow-list: nothing else in a shard is ever decoded, in particular no pickle."""
OWN_FOLDER = "folder"
"""`source` of samples made by `emcl prepare folder`."""
Time = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Seconds from a file's start."""


@with_config(ConfigDict(extra="allow"))
class QAPair(TypedDict):
    """A question about a video, with its answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A video's annotations, as stored in a shard's JSON."""

    id: Annotated[str, Field(min_length=1)]
    source: str = ""
    split: str = ""
    captions: list[str] = field(default_factory=list)
    qa: list[QAPair] = field(default_factory=list)
    start: Time | None = None
    """Seconds; where the sample starts in the file, or None for the file's start."""
    end: Time | None = None

    def to_json(self) -> bytes:
        """The JSON that a shard stores.

        Raises:
            UserError: it could not be read back; names the field, such as an answer that is a number.
        """
        try:
            text = json.dumps(asdict(self), ensure_ascii=False, sort_keys=True).encode()
            _checked(text)
        except ValueError as error:  # including a name that is not valid UTF-8
            raise UserError(f"sample {self.id!r} cannot be written: {error}") from None
        return text

    @staticmethod
    def from_json(text: bytes, where: str) -> Sample:
        """Validates the JSON here, once, so that all other code can rely on the field types.

        Raises:
            UserError: `text` is not an object of this schema; names `where` and what is wrong.
        """
        try:
            return _checked(text)
        except ValueError as error:
            raise UserError(f"{where}: not a sample's JSON ({error}); write shards with `emcl prepare`") from None


BOM = b"\xef\xbb\xbf"
"""Byte order mark that some editors put before UTF-8."""


def _checked(text: bytes) -> Sample:
    """Raises ValueError if it is not a sample, with the first problem in one line."""
    try:
        sample: Sample = _schema().validate_json(text.removeprefix(BOM), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field_path = ".".join(map(str, first["loc"]))
        raise ValueError(f"{field_path}: {first['msg']}" if field_path else first["msg"]) from None
    if sample.end is not None and sample.end <= (sample.start or 0.0):
        raise ValueError(f"end={sample.end} is not after start={sample.start or 0.0}")
    return sample


@cache
def _schema() -> TypeAdapter[Any]:
    return TypeAdapter(Sample)
