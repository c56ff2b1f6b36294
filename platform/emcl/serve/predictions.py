"""HTTP endpoints for the predictions of the model's tasks: two for each task that makes predictions.

`/api/caption` and `/api/answer` use whichever task captions or answers.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request

from emcl.serve.parameters import NOT_THERE, WRONG, WRONG_VIDEO, Number, Text, Top, window_of
from emcl.serve.schemas import Answer, Answers, Caption, Predictions, Said
from emcl.serve.service import Asked, Service
from emcl.serve.uploads import BODY, Uploads
from emcl.serve.work_queue import WorkQueue
from emcl.task import Offer, Prediction

SENT: dict[str, Any] = {"responses": {**WRONG, **WRONG_VIDEO, **NOT_THERE}, "openapi_extra": BODY}
INDEXED: dict[str, Any] = {"responses": {**WRONG, **NOT_THERE}}
CAPTION = Asked(verb="caption")


class _Asking:
    """Runs predictions on a sent video, or on an indexed window."""

    def __init__(self, service: Service, queue: WorkQueue, uploads: Uploads) -> None:
        self.service, self.queue, self.uploads = service, queue, uploads

    async def of_sent(self, request: Request, asked: Asked) -> list[Prediction]:
        self.service.check(asked)  # before the video is received
        async with self.uploads.receive(request) as video:
            return await self.queue.run(self.service.predict, video.path, video.digest, asked)

    async def of_window(self, number: int, asked: Asked) -> list[Prediction]:
        self.service.check(asked)
        window = window_of(self.service.index, number)
        return await self.queue.run(self.service.predict_of_window, window, asked)


def add_predictions(app: FastAPI, service: Service, queue: WorkQueue, uploads: Uploads) -> None:
    """Adds all endpoints of this module; `queue` is the queue of requests to the model."""
    model = _Asking(service, queue, uploads)
    for task, offer in service.offers.items():
        _add_task(app, model, task, offer)
    _add_others(app, model)

    @app.post("/api/caption", tags=["predict"], **SENT)
    async def caption(request: Request) -> Caption:
        """A sentence about the video that is sent, by the task that captions."""
        return _caption(await model.of_sent(request, CAPTION))

    @app.get("/api/windows/{number}/caption", tags=["predict"], **INDEXED)
    async def caption_of_window(number: Number) -> Caption:
        """A sentence about an indexed part, by the task that captions."""
        return _caption(await model.of_window(number, CAPTION))

    @app.post("/api/answer", tags=["predict"], **SENT)
    async def answer(request: Request, question: Text, top: Top = 3) -> Answers:
        """The likeliest answers to a question about the video that is sent, by the task that answers."""
        return _answers(await model.of_sent(request, Asked(None, "answer", question, top)))

    @app.get("/api/windows/{number}/answer", tags=["predict"], **INDEXED)
    async def answer_of_window(number: Number, question: Text, top: Top = 3) -> Answers:
        """The likeliest answers to a question about an indexed part, by the task that answers."""
        return _answers(await model.of_window(number, Asked(None, "answer", question, top)))


def _add_task(app: FastAPI, model: _Asking, task: str, offer: Offer) -> None:
    """Two endpoints per task, so that OpenAPI shows which tasks exist and which take a question."""
    sent: dict[str, Any] = {**SENT, "tags": ["predict"], "description": offer.description}
    indexed: dict[str, Any] = {**INDEXED, "tags": ["predict"], "description": offer.description}
    of_sent, of_window = f"/api/predict/{task}", f"/api/windows/{{number}}/predict/{task}"

    if offer.question is None:

        @app.post(of_sent, operation_id=f"predict_{task}", **sent)
        async def predict(request: Request, top: Top = 3) -> Predictions:
            return _predictions(await model.of_sent(request, Asked(task, None, _unwanted(request), top)))

        @app.get(of_window, operation_id=f"predict_{task}_of_window", **indexed)
        async def predict_of_window(request: Request, number: Number, top: Top = 3) -> Predictions:
            return _predictions(await model.of_window(number, Asked(task, None, _unwanted(request), top)))

    else:

        @app.post(of_sent, operation_id=f"predict_{task}", **sent)
        async def ask(request: Request, question: Text, top: Top = 3) -> Predictions:
            return _predictions(await model.of_sent(request, Asked(task, None, question, top)))

        @app.get(of_window, operation_id=f"predict_{task}_of_window", **indexed)
        async def ask_of_window(number: Number, question: Text, top: Top = 3) -> Predictions:
            return _predictions(await model.of_window(number, Asked(task, None, question, top)))


def _add_others(app: FastAPI, model: _Asking) -> None:
    """Answers an unknown task name with the list of tasks."""

    @app.post("/api/predict/{task}", include_in_schema=False)
    @app.get("/api/windows/{number}/predict/{task}", include_in_schema=False)
    async def no_such_task(task: str) -> None:
        model.service.check(Asked(task))


def _unwanted(request: Request) -> str | None:
    """The question sent to a task that takes none; passed on so that the task rejects it."""
    return request.query_params.get("question")


def _predictions(said: list[Prediction]) -> Predictions:
    return Predictions(predictions=[Said(text=one.text, probability=one.probability) for one in said])


def _caption(said: list[Prediction]) -> Caption:
    return Caption(caption=said[0].text)


def _answers(said: list[Prediction]) -> Answers:
    return Answers(answers=[Answer(answer=one.text, probability=one.probability) for one in said])
