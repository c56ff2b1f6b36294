"""The endpoints' parameters and their error responses, as shown in OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import HTTPException, Query
from fastapi import Path as InPath

from emcl.search.hits import Window
from emcl.search.index import VideoIndex
from emcl.serve.schemas import LAST_WINDOW, Problem, Sentence

Number = Annotated[int, InPath(ge=1, le=LAST_WINDOW, description="a window's number")]
Top = Annotated[int, Query(ge=1, le=100, description="how many")]
Text = Annotated[Sentence, Query(description="a sentence")]
WRONG: dict[int | str, dict[str, Any]] = {
    422: {"model": Problem, "description": "a parameter is missing or wrong"},
    503: {"model": Problem, "description": "too many requests wait: come back after Retry-After seconds"},
}
WRONG_VIDEO: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "nothing was sent, or it is no video"},
    413: {"model": Problem, "description": "it is too large"},
    415: {"model": Problem, "description": "its Content-Type is no video's"},
}
NOT_THERE: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "no such window, or the model has no task for this"}
}


def window_of(index: VideoIndex, number: int) -> Window:
    """The window with this number. Raises HTTPException 404 if there is none."""
    window = index.window(number)
    if window is None:
        raise HTTPException(404, f"there is no window {number}, or its file has gone")
    return window
