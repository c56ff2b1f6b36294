"""The commands for people with videos: index, search, caption, ask."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emcl.errors import UserError

if TYPE_CHECKING:
    from emcl.inference import VideoTextModel
    from emcl.search.index import Hit


def add_commands(commands: Any) -> None:
    """To the parser of `emcl`."""
    index = commands.add_parser(
        "index",
        help="make a folder of videos searchable; again, to take in what changed",
        description="Cuts long videos into overlapping windows and embeds each. Only new and changed files are "
        "encoded; those that have gone leave the index. A killed call goes on where it was.",
    )
    index.add_argument("videos", type=Path, metavar="DIR")
    _model(index)
    index.add_argument("--out", type=Path, required=True, metavar="INDEX", help="folder of the index")
    index.add_argument("--window", type=float, default=10.0, help="seconds of a window (default: %(default)s)")
    index.add_argument("--overlap", type=float, default=5.0, help="seconds it shares with the next (%(default)s)")
    index.set_defaults(act=_index)

    search = commands.add_parser("search", help="find moments by a sentence, or by a video")
    search.add_argument("index", type=Path, metavar="INDEX")
    search.add_argument("query", nargs="?", help='such as "a red circle moves left"')
    search.add_argument("--video", type=Path, help="search by what this video looks like")
    _model(search)
    search.add_argument("--top", type=int, default=10, help="hits (default: %(default)s)")
    search.add_argument("--json", action="store_true", help="one JSON object a line")
    search.set_defaults(act=_search)

    caption = commands.add_parser("caption", help="write a sentence about each video")
    caption.add_argument("files", type=Path, nargs="+", metavar="FILE")
    _model(caption)
    caption.set_defaults(act=_caption)

    ask = commands.add_parser("ask", help="ask a question about a video")
    ask.add_argument("file", type=Path, metavar="FILE")
    ask.add_argument("question")
    _model(ask)
    ask.add_argument("--top", type=int, default=3, help="answers (default: %(default)s)")
    ask.set_defaults(act=_ask)


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="RUN", help="a run's folder or an export; or a CLIP's name")
    parser.add_argument("--pretrained", type=Path, metavar="FILE", help="weights of the CLIP that --model names")


def _open(options: argparse.Namespace) -> VideoTextModel:
    from emcl.inference import load

    return load(options.model, pretrained=options.pretrained)


def _index(options: argparse.Namespace) -> None:
    from emcl.search.index import VideoIndex
    from emcl.search.windows import Windows

    if not options.videos.is_dir():
        raise UserError(f"{options.videos}: no such folder")
    if not 0 <= options.overlap < options.window:
        raise UserError(f"--overlap {options.overlap} is not between 0 and --window {options.window}")
    index = VideoIndex(options.out, _open(options), windows=Windows(options.window, options.overlap))
    changes = index.update(options.videos)
    for path, reason in changes.broken.items():
        print(f"left out: {path}: {reason}")
    print(
        f"{options.out}: {len(index)} windows; {changes.added} files encoded, {changes.kept} as they were, "
        f"{changes.removed} forgotten, {len(changes.broken)} left out"
    )


def _search(options: argparse.Namespace) -> None:
    from emcl.search.index import VideoIndex

    if (options.query is None) == (options.video is None):
        raise UserError("give a sentence, or --video FILE")
    index = VideoIndex(options.index, _open(options))
    if options.video is not None:
        hits = index.search_by_video(options.video, options.top)
    else:
        hits = index.search(options.query, options.top)
    for place, hit in enumerate(hits, 1):
        print(json.dumps(asdict(hit), ensure_ascii=False) if options.json else _line(place, hit))


def _line(place: int, hit: Hit) -> str:
    return f"{place:>3}  {hit.score:7.3f}  {_clock(hit.start)} to {_clock(hit.end)}  {hit.path}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{seconds % 60:04.1f}"


def _caption(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    model = _open(options)
    for file in tqdm(options.files, unit="video", disable=len(options.files) < 5):
        tqdm.write(f"{file}: {model.caption(file)[0]}")


def _ask(options: argparse.Namespace) -> None:
    for answer, share in _open(options).answer(options.file, options.question, top=options.top):
        print(f"{share:6.1%}  {answer}")
