"""Request and response schemas of the HTTP API; OpenAPI is generated from them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Sentence = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"[^\s\u0085\ufeff]")]
"""Not empty and not only white space. Regular-expression engines disagree on the two listed characters."""
MOST_TEXTS = 64
LAST_WINDOW = 2**63 - 1
"""SQLite's largest integer."""


class Found(BaseModel):
    """A part of an indexed video."""

    window: int = Field(description="its number, for /api/windows/...")
    path: str = Field(description="of the file, below the indexed folder")
    start: float = Field(description="seconds")
    end: float
    score: float = Field(description="the model's similarity, or the cosine for a search by video")
    thumbnail: str
    video: str = Field(description="plays in a browser: the file itself, or this part where browsers cannot play it")
    at: float = Field(description="seconds of `video` from where the part plays")


class Hits(BaseModel):
    hits: list[Found]


class Texts(BaseModel):
    model_config = ConfigDict(extra="forbid")
    texts: list[Sentence] = Field(min_length=1, max_length=MOST_TEXTS)


class Embeddings(BaseModel):
    """Rows of equal width, one per sentence or per frame."""

    embeddings: list[list[float]]


class Said(BaseModel):
    """One prediction of a task about a video."""

    text: str
    probability: float | None = Field(description="from 0 to 1; null where the task gives none")


class Predictions(BaseModel):
    predictions: list[Said] = Field(description="the likeliest first")


class Caption(BaseModel):
    caption: str


class Answer(BaseModel):
    answer: str
    probability: float | None = Field(description="from 0 to 1; null where the task gives none")


class Answers(BaseModel):
    answers: list[Answer]


class Curve(BaseModel):
    """Cosine similarity of a sentence and each frame, over a video's seconds."""

    seconds: list[float]
    similarity: list[float]


class Offered(BaseModel):
    """A task that makes predictions about a video, at /api/predict/{task}."""

    task: str
    verb: str
    button: str = Field(description="what the page writes on its button")
    description: str
    question: str | None = Field(description="an example of the question that it is asked; null if it is asked none")


class Facts(BaseModel):
    windows: int
    tasks: list[str] = Field(description="what the model was trained for")
    offers: list[Offered] = Field(description="those of the tasks that say something of a video")
    model: str = Field(description="its fingerprint")
    max_upload_mib: float


class Health(BaseModel):
    status: str


class Problem(BaseModel):
    """What is wrong, in one line."""

    detail: str
