"""The commands for people with videos: index, search, predict, caption, ask, serve."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emcl.arguments import check_out, number, whole
from emcl.errors import UserError

if TYPE_CHECKING:
    from emcl.inference import VideoTextModel
    from emcl.prepare.clips import Clip
    from emcl.search.hits import Hit
    from emcl.task import Prediction


PAIRS = (".csv", ".json", ".jsonl")


def add_commands(commands: Any) -> None:
    """Adds them to the parser of `emcl`."""
    index = commands.add_parser(
        "index",
        help="make a folder of videos searchable; again, to take in what changed",
        description="Cuts videos into scenes, and long ones of those into overlapping windows, and embeds each. Only "
        "new and changed files are encoded; those that have gone leave the index. A killed call goes on where it was.",
    )
    index.add_argument("videos", type=Path, metavar="DIR")
    _model(index)
    _compared(index)
    index.add_argument("--out", type=Path, required=True, metavar="INDEX", help="folder of the index")
    index.add_argument("--window", type=number(gt=0), default=10.0, help="seconds of a window (default: %(default)s)")
    index.add_argument(
        "--overlap", type=number(ge=0), default=5.0, help="seconds it shares with the next (%(default)s)"
    )
    index.add_argument(
        "--cut", choices=("scenes", "windows"), default="scenes",
        help="at hard cuts and then by time, or by time alone, which is faster (default: %(default)s)",
    )  # fmt: skip
    index.add_argument(
        "--emcl", type=Path, nargs="?", const=True, metavar="FILE",
        help="fit EMCL to the collection, for a model that has not learnt from it. FILE.csv (or .json, .jsonl; columns "
        "`file`, `caption`, as of `emcl prepare folder`): shared factors of its `train` pairs. Without pairs, for a "
        "model without, the compact layer: fitted to the videos, and with FILE.txt to its sentences too, one a line",
    )  # fmt: skip
    index.add_argument(
        "--no-factors", dest="factors", action="store_false", help="leave out the shared factors that the model has"
    )
    index.set_defaults(act=_index)

    search = commands.add_parser("search", help="find moments by a sentence, or by a video")
    search.add_argument("index", type=Path, metavar="INDEX")
    search.add_argument("query", nargs="?", help='such as "a red circle moves left"')
    search.add_argument("--video", type=Path, help="search by what this video looks like")
    search.add_argument("--queries", type=Path, metavar="FILE", help="search for every line of a text file")
    _model(search)
    _compared(search)
    search.add_argument("--top", type=whole(ge=1), default=10, help="hits (default: %(default)s)")
    search.add_argument("--json", action="store_true", help="one JSON object a line")
    search.set_defaults(act=_search)

    predict = commands.add_parser(
        "predict",
        help="what a task of a model says of each video; any task that says something",
        description="What a task says of each video: captions, answers to --question, or what another package's task "
        "offers. `emcl caption` and `emcl ask` are short for it.",
    )
    predict.add_argument("files", type=Path, nargs="+", metavar="FILE")
    _model(predict)
    _said_by(predict)
    predict.add_argument("--question", help="about each video, for a task that is asked one")
    predict.add_argument("--top", type=whole(ge=1), default=3, help="of each video at most (default: %(default)s)")
    predict.add_argument("--json", action="store_true", help="one JSON object a line")
    predict.set_defaults(act=_predict)

    caption = commands.add_parser("caption", help="write a sentence about each video")
    caption.add_argument("files", type=Path, nargs="+", metavar="FILE")
    _model(caption)
    _said_by(caption)
    caption.set_defaults(act=_caption)

    ask = commands.add_parser("ask", help="ask a question about a video")
    ask.add_argument("file", type=Path, metavar="FILE")
    ask.add_argument("question")
    _model(ask)
    _said_by(ask)
    ask.add_argument("--top", type=whole(ge=1), default=3, help="answers (default: %(default)s)")
    ask.set_defaults(act=_ask)

    serve = commands.add_parser(
        "serve",
        help="a page to search in, and an HTTP API beside it",
        description="The page is at /, the API's description at /docs and /openapi.json, Prometheus' figures at "
        "/metrics. Whoever reaches the port sees the indexed videos: there is no password.",
    )
    serve.add_argument("index", type=Path, metavar="INDEX")
    _model(serve)
    _compared(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    serve.add_argument(
        "--port", type=whole(ge=0, lt=2**16), default=8000, help="(default: %(default)s; 0 takes a free one)"
    )
    serve.add_argument("--queue", type=whole(ge=1), default=128, help="requests that may wait (default: %(default)s)")
    serve.add_argument("--max-upload", type=number(gt=0), default=200, help="MiB of a video that is sent (%(default)s)")
    serve.add_argument("--open", action="store_true", help="open the page in a browser")
    serve.set_defaults(act=_serve)


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="RUN", help="a run's folder or an export; or a CLIP's name")
    parser.add_argument("--pretrained", type=Path, metavar="FILE", help="weights of the CLIP that --model names")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: all GPUs, the CPU where there is none)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="(default: the run's own; fp32 on a CPU)")


def _compared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", dest="compare_by", metavar="NAME", help="compare by this task, of a model with several that do"
    )


def _said_by(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", metavar="NAME", help="which of the model's tasks, where several can be meant")


def _open(options: argparse.Namespace) -> VideoTextModel:
    from emcl.inference import load

    return load(
        options.model,
        pretrained=options.pretrained,
        device=options.device,
        precision=options.precision,
        task=getattr(options, "compare_by", None),
        factors=getattr(options, "factors", True),
    )


def _index(options: argparse.Namespace) -> None:
    from emcl.model.pair_scores import described_factors
    from emcl.run_folder import FACTORS
    from emcl.search.index import VideoIndex
    from emcl.search.pairs_of_files import paths_of
    from emcl.search.vectors import faiss_package
    from emcl.search.windows import Windows

    if not options.videos.is_dir():
        raise UserError(f"{options.videos}: no such folder")
    if options.overlap >= options.window:
        raise UserError(f"--overlap {options.overlap:g} is not below --window {options.window:g}")
    check_out(options.out, folder=True)
    file: Path | None = None if options.emcl is True else options.emcl
    sentences, pairs = _sentences_or_pairs(file) if file is not None else ([], [])
    faiss_package()
    if not options.factors and (pairs or (options.out / FACTORS).is_file()):
        raise UserError(f"--no-factors: {options.out} is to have those of its own pairs")
    if pairs:
        paths_of(pairs, options.videos)  # before the work
    model = _open(options)
    fits_layer = options.emcl is not None and not pairs
    if fits_layer:
        model.check_no_emcl()
    if pairs:
        model.check_takes_factors()
    index = VideoIndex(options.out, model, windows=Windows(options.window, options.overlap, options.cut))
    changes = index.update(options.videos, emcl=fits_layer, sentences=sentences)
    for path, reason in changes.broken.items():
        print(f"left out: {path}: {reason}")
    print(
        f"{options.out}: {len(index)} windows; {changes.added} files encoded, {changes.kept} as they were, "
        f"{changes.removed} forgotten, {len(changes.broken)} left out"
    )
    if pairs:
        index.fit_pairs(pairs, options.videos)
    if index.model.factors is not None:
        print(f"searched with {described_factors(index.model.factors)}")


def _sentences_or_pairs(file: Path) -> tuple[list[str], list[Clip]]:
    """What `--emcl FILE` holds: one of both is empty."""
    from emcl.prepare.table import read_table

    if file.suffix == ".txt":
        if sentences := _lines(file):
            return sentences, []
        raise UserError(f"--emcl {file} holds no sentence")
    if file.suffix in PAIRS:
        if pairs := [clip for clip in read_table(file) if clip.split == "train"]:
            return [], pairs
        raise UserError(f"--emcl {file} has no line of the split `train`, which is the default")
    raise UserError(f"--emcl {file}: give pairs ({', '.join(PAIRS)}) or sentences (.txt)")


def _search(options: argparse.Namespace) -> None:
    from emcl.search.index import VideoIndex, check_index

    if sum(given is not None for given in (options.query, options.video, options.queries)) != 1:
        raise UserError("give a sentence, or --video FILE, or --queries FILE")
    check_index(options.index)
    _check_files([options.video] if options.video else [])
    texts = [options.query] if options.queries is None else _lines(options.queries)
    index = VideoIndex(options.index, _open(options))
    if options.video is not None:
        results = [(str(options.video), index.search_by_video(options.video, options.top))]
    else:
        results = list(zip(texts, index.search_all(texts, options.top), strict=True))
    for query, hits in results:
        if options.queries is not None and not options.json:
            print(f"\n{query}")
        for rank, hit in enumerate(hits, 1):
            asked = {"query": query} if options.queries is not None else {}
            print(json.dumps({**asked, **asdict(hit)}, ensure_ascii=False) if options.json else _line(rank, hit))


def _check_files(files: list[Path]) -> None:
    """Checks that they exist, before a model is loaded."""
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")


def _lines(file: Path) -> list[str]:
    _check_files([file])
    lines = [line.strip() for line in file.read_text().splitlines()]
    return [line for line in lines if line]


def _line(rank: int, hit: Hit) -> str:
    return f"{rank:>3}  {hit.score:7.3f}  {_clock(hit.start)} to {_clock(hit.end)}  {hit.path}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{seconds % 60:04.1f}"


def _predict(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    _check_files(options.files)
    model = _open(options)
    task = model.task_for(options.task, question=options.question)
    for file in tqdm(options.files, unit="video", disable=len(options.files) < 5):
        (predictions,) = model.predict(file, options.question, task=task, top=options.top)
        if options.json:
            record = {"path": str(file), "task": task, "predictions": [asdict(one) for one in predictions]}
            tqdm.write(json.dumps(record, ensure_ascii=False))
        else:
            tqdm.write(f"{file}: {', '.join(_said(one) for one in predictions)}")


def _said(prediction: Prediction) -> str:
    share = "" if prediction.probability is None else f" ({prediction.probability:.1%})"
    return f"{prediction.text}{share}"


def _caption(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    _check_files(options.files)
    model = _open(options)
    for file in tqdm(options.files, unit="video", disable=len(options.files) < 5):
        tqdm.write(f"{file}: {model.caption(file, task=options.task)[0]}")


def _ask(options: argparse.Namespace) -> None:
    _check_files([options.file])
    model = _open(options)
    for answer, share in model.answer(options.file, options.question, top=options.top, task=options.task):
        print(f"{'' if share is None else f'{share:.1%}':>6}  {answer}")


def _serve(options: argparse.Namespace) -> None:
    from emcl.search.index import VideoIndex, check_index
    from emcl.serve.request_limits import Limits
    from emcl.serve.server import bind, serve

    check_index(options.index)
    limits = Limits(waiting=options.queue, upload_mib=options.max_upload)
    with bind(options.host, options.port) as address:
        model = _open(options)
        model.check_compare_by()
        index = VideoIndex(options.index, model)
        serve(index, limits, address, host=options.host, browser=options.open)
