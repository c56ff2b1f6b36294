"""The HTTP API and the web page for one index: `emcl serve INDEX --model RUN`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from emcl.data.decode import DecodeError
from emcl.errors import UserError
from emcl.given_videos import VideoError
from emcl.inference import QuestionError
from emcl.search.hits import Hit
from emcl.search.index import VideoIndex
from emcl.serve import media
from emcl.serve.parameters import NOT_THERE, WRONG, WRONG_VIDEO, Number, Text, Top, window_of
from emcl.serve.predictions import add_predictions
from emcl.serve.prometheus import Metrics
from emcl.serve.protection import Headers
from emcl.serve.request_limits import Limits
from emcl.serve.schemas import (
    Curve,
    Embeddings,
    Facts,
    Found,
    Health,
    Hits,
    Offered,
    Problem,
    Texts,
)
from emcl.serve.service import Service
from emcl.serve.uploads import BODY, Uploads
from emcl.serve.work_queue import BusyError, WorkQueue
from emcl.version import __version__


def build_app(index: VideoIndex, limits: Limits | None = None) -> FastAPI:
    """Builds the application; its threads end when it shuts down."""
    limits = limits or Limits()
    queue = WorkQueue("model", threads=1, waiting=limits.waiting)
    pictures = WorkQueue("pictures", threads=2, waiting=4 * limits.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()
        pictures.close()

    app = FastAPI(
        title="emcl",
        version=__version__,
        description="Search a folder of videos by sentence or by video; embed; and ask the model's tasks about videos.",
        lifespan=lifespan,
        redoc_url=None,
    )
    service, uploads = Service(index, limits.kept), Uploads(limits)
    _add_problems(app)
    _add_texts(app, service, queue)
    _add_videos(app, service, queue, uploads)
    _add_windows(app, service, queue)
    add_predictions(app, service, queue, uploads)
    _add_media(app, index, pictures)
    _add_state(app, service, queue, limits)
    _add_page(app)
    app.add_middleware(Headers)
    return app


def _add_page(app: FastAPI) -> None:
    folder = Path(str(files("emcl.serve") / "page"))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(folder / "index.html")

    app.mount("/page", StaticFiles(directory=folder))


def _add_problems(app: FastAPI) -> None:
    """Returns every error as `{"detail": one line}`."""

    async def busy(_: Request, __: Exception) -> Response:
        return JSONResponse({"detail": "too many requests wait; come back soon"}, 503, {"Retry-After": "1"})

    async def no_video(_: Request, error: Exception) -> Response:
        reason = error.reason if isinstance(error, VideoError) else str(error)  # without the temporary file's name
        return JSONResponse({"detail": f"the video does not decode: {reason}"}, 400)

    async def not_possible(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": str(error)}, 404)

    async def wrong(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return JSONResponse({"detail": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)

    app.add_exception_handler(BusyError, busy)
    app.add_exception_handler(DecodeError, no_video)
    app.add_exception_handler(VideoError, no_video)

    async def wrong_question(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": f"query.question: {error}"}, 422)

    app.add_exception_handler(UserError, not_possible)
    app.add_exception_handler(QuestionError, wrong_question)
    app.add_exception_handler(RequestValidationError, wrong)


def _add_texts(app: FastAPI, service: Service, queue: WorkQueue) -> None:
    @app.get("/api/search", responses=WRONG, tags=["search"])
    async def search(query: Text, top: Top = 10) -> Hits:
        """Moments that a sentence fits best."""
        return await queue.run(lambda: _hits(service.search(query, top), service.index))

    no_json: dict[int | str, dict[str, Any]] = {400: {"model": Problem, "description": "the body is no JSON"}}

    @app.post("/api/embed/text", responses={**WRONG, **no_json}, tags=["embed"])
    async def embed_text(texts: Texts) -> Embeddings:
        """A row for each sentence, as the model compares them with frames."""
        embeddings = await queue.run(service.embed_texts, texts.texts)
        return Embeddings(embeddings=embeddings.tolist())


def _add_videos(app: FastAPI, service: Service, queue: WorkQueue, uploads: Uploads) -> None:
    """Endpoints for a video that the request sends; the video is not stored."""
    sent: dict[str, Any] = {"responses": {**WRONG, **WRONG_VIDEO}, "openapi_extra": BODY}

    @app.post("/api/search/video", tags=["search"], **sent)
    async def search_by_video(request: Request, top: Top = 10) -> Hits:
        """Moments that look most like the video that is sent."""
        async with uploads.receive(request) as video:
            return await queue.run(lambda: _hits(service.search_by_video(video.path, video.digest, top), service.index))

    @app.post("/api/embed/video", tags=["embed"], **sent)
    async def embed_video(request: Request) -> Embeddings:
        """A row for each frame that the model looks at."""
        async with uploads.receive(request) as video:
            embeddings = await queue.run(service.embed_video, video.path, video.digest)
        return Embeddings(embeddings=embeddings.tolist())

    @app.post("/api/curve", tags=["curve"], **sent)
    async def curve(request: Request, query: Text) -> Curve:
        """How well a sentence fits each moment of the video that is sent."""
        async with uploads.receive(request) as video:
            return _curve(await queue.run(service.curve, video.path, video.digest, query))


def _add_windows(app: FastAPI, service: Service, queue: WorkQueue) -> None:
    """The same for an indexed window."""
    indexed: dict[str, Any] = {"responses": {**WRONG, **NOT_THERE}}

    @app.get("/api/windows/{number}/similar", tags=["search"], **indexed)
    async def similar(number: Number, top: Top = 10) -> Hits:
        """Moments that look most like an indexed part."""
        window = window_of(service.index, number)
        return await queue.run(lambda: _hits(service.similar(window, top), service.index))

    @app.get("/api/windows/{number}/curve", tags=["curve"], **indexed)
    async def curve(number: Number, query: Text) -> Curve:
        """How well a sentence fits each moment of the whole file that a part is of."""
        window = window_of(service.index, number)
        return _curve(await queue.run(service.curve_of_window, window, query))


def _add_media(app: FastAPI, index: VideoIndex, pictures: WorkQueue) -> None:
    """Requests identify files only by window numbers, so no path can be requested."""
    kept = {"Cache-Control": "max-age=3600"}

    def media_options(kind: str, *others: int) -> dict[str, Any]:
        responses: dict[int | str, dict[str, Any]] = {200: {"content": {kind: {}}}, 404: NOT_THERE[404]}
        responses |= {status: {"description": "a part of it, by Range"} for status in others}
        return {"responses": {**responses, **WRONG}, "response_class": Response, "tags": ["media"]}

    @app.get("/api/windows/{number}/thumbnail.jpg", **media_options("image/jpeg"))
    async def thumbnail(number: Number) -> Response:
        """The frame in the middle of a part."""
        window = window_of(index, number)
        return Response(
            await pictures.run(media.thumbnail, window.file, window.start, window.end), 200, kept, "image/jpeg"
        )

    @app.get("/api/windows/{number}/excerpt.mp4", **media_options("video/mp4"))
    async def excerpt(number: Number) -> Response:
        """A part as H.264, whatever its file is."""
        window = window_of(index, number)
        return Response(
            await pictures.run(media.excerpt, window.file, window.start, window.end), 200, kept, "video/mp4"
        )

    @app.get("/api/windows/{number}/video", **media_options("video/mp4", 206))
    async def video(number: Number) -> Response:
        """The whole file that a part is of, if browsers play it."""
        window = window_of(index, number)
        kind = media.media_type(window.file)
        if kind is None:
            raise HTTPException(404, f"browsers do not play {window.file.name}; take excerpt.mp4")
        return FileResponse(window.file, media_type=kind)


def _add_state(app: FastAPI, service: Service, queue: WorkQueue, limits: Limits) -> None:
    fingerprint = service.model.fingerprint()
    metrics = Metrics(waiting=lambda: queue.here, windows=lambda: len(service.index))

    @app.get("/api/facts", tags=["state"])
    async def facts() -> Facts:
        """What is indexed, and what the model can do."""
        offers = [Offered(task=name, **asdict(offer)) for name, offer in service.offers.items()]
        return Facts(
            windows=len(service.index),
            tasks=service.tasks,
            offers=offers,
            model=fingerprint,
            max_upload_mib=limits.upload_mib,
        )

    @app.get("/healthz", tags=["state"])
    async def healthz() -> Health:
        """Answers while the server takes requests."""
        return Health(status="ok")

    @app.get(
        "/metrics", tags=["state"], response_class=Response, responses={200: {"content": {metrics.media_type: {}}}}
    )
    async def read_metrics() -> Response:
        """Prometheus' text: requests, seconds, requests that wait for the model, memory."""
        return Response(metrics.text(), media_type=metrics.media_type)

    app.add_middleware(metrics.middleware())


def _hits(hits: list[Hit], index: VideoIndex) -> Hits:
    """Adds links to pictures and videos; opens files to check whether browsers play them, so not on the event loop."""
    return Hits(hits=[_with_links(hit, index) for hit in hits])


def _with_links(hit: Hit, index: VideoIndex) -> Found:
    base, window = f"/api/windows/{hit.window}", index.window(hit.window)
    whole = window is not None and media.media_type(window.file) is not None
    return Found(
        **asdict(hit),
        thumbnail=f"{base}/thumbnail.jpg",
        video=f"{base}/video" if whole else f"{base}/excerpt.mp4",
        at=hit.start if whole else 0.0,
    )


def _curve(points: list[tuple[float, float]]) -> Curve:
    return Curve(seconds=[time for time, _ in points], similarity=[value for _, value in points])
