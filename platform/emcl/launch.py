"""Trains or evaluates: what each rank runs, and what becomes of `emcl train` and `emcl evaluate`.

`deepspeed platform/launch.py ...` calls this from a checkout, `deepspeed --module emcl.launch ...` anywhere.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

from emcl.arguments import Parser, add_help, task_names, whole
from emcl.config import Config
from emcl.disk import why_not_written
from emcl.errors import OneRankError, UserError, one_line
from emcl.resources import is_file
from emcl.run_folder import RUNS, RunFolder
from emcl.secrets import masked
from emcl.train.run_config import AUTO, config_of_run, find_run

LAUNCHED, MODULE = "deepspeed platform/launch.py", "deepspeed --module emcl.launch"
EXAMPLES = """Trains or evaluates: `{command} --task retrieval [key=value ...]`.

{command} --task retrieval                      the sample set, end to end
{command} --task retrieval optim.lr=1e-4 emcl.bases=16 deepspeed=configs/deepspeed/zero3.json
{command} --task retrieval --evaluate runs/NAME
{command} --task retrieval --resume
{command} --recipe msrvtt_retrieval data.root=shards/msrvtt --dry-run      what it would take
"""
ELSEWHERE = "On several machines: deepspeed --hostfile FILE --module emcl.launch ...; on some GPUs: --num_gpus N"
APART = (
    ("resume", "recipe", "a run goes on with its own settings; key=value changes one"),
    ("resume", "init", "a run goes on with its own weights"),
    ("resume", "evaluate", "the one trains, the other scores"),
    ("evaluate", "init", "an evaluation takes the weights of its run"),
    ("evaluate", "dry_run", "the plan is of a training"),
    ("evaluate", "profile", "the profile is of training steps"),
)
"""Options that exclude each other, and why."""


def train_parser(command: str) -> Parser:
    parser = Parser(
        prog=command.rpartition("/")[2],
        description=EXAMPLES.format(command=command),
        epilog=None if command == LAUNCHED else ELSEWHERE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    add_help(parser)
    parser.add_argument(
        "--task",
        type=task_names,
        help="one or several of `emcl tasks`, joined by commas, or `all`; a benchmark's recipe names its own; "
        "kinds.NAME=TASK makes another of a kind",
    )
    parser.add_argument("--recipe", default=None, help="a file of configs/recipe, or a path (default: sample)")
    parser.add_argument(
        "--evaluate",
        metavar="PATH",
        type=Path,
        help="score a run's folder or an export on data.test, on the tasks of --task alone if given; no training",
    )
    parser.add_argument(
        "--init",
        metavar="PATH",
        type=Path,
        help="start from the weights of a run or an export, of these tasks or others",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=AUTO,
        metavar="RUN",
        help="continue a run's folder (without RUN: the one of name=, or the newest, of the tasks of --task if given)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan: weights, steps, memory by ZeRO stage, missing files"
    )
    parser.add_argument(
        "--profile",
        type=whole(ge=1),
        metavar="N",
        help="show where the time of N steps goes; the trace is kept with the run",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, such as optim.lr=1e-4 data.train='a-{0..3}.tar'"
    )
    return parser


def parse(arguments: list[str] | None, command: str = LAUNCHED) -> argparse.Namespace:
    parser = train_parser(command)
    options = parser.parse_intermixed_args(arguments)
    if options.resume and "=" in options.resume and not _is_run(options.resume):
        options.overrides.insert(0, options.resume)  # `--resume optim.epochs=9`
        options.resume = AUTO
    for one, other, why in APART:
        if getattr(options, one) and getattr(options, other):
            parser.error(f"--{one} and --{other.replace('_', '-')} exclude each other: {why}")
    if options.profile:
        options.overrides.append(f"tracking.profile={options.profile}")
    if not (options.task or options.recipe or options.evaluate or options.resume):
        parser.error("--task NAME or --recipe NAME is needed, such as --task retrieval")
    return options


def _is_run(text: str) -> bool:
    """Whether `--resume` is followed by a run, whose name may hold an `=`, and not by a setting."""
    return any(is_file(RunFolder(path).config_file) for path in (Path(text), Path(RUNS) / text))


def check(options: argparse.Namespace) -> Callable[[], Config]:
    """What can be seen to be wrong without PyTorch; gives what makes the whole configuration.

    Raises:
        UserError: one line for the user.
    """
    from emcl.data.sampler import check_divisible
    from emcl.data.shard_checks import check_local
    from emcl.model.architecture_limits import check_limits
    from emcl.registry import early_settings_of
    from emcl.train.deepspeed_file import read_deepspeed

    resumed = find_run(options.resume, options.task, options.overrides) if options.resume else None
    chosen = partial(
        config_of_run, options.task, options.recipe, options.overrides, evaluate=options.evaluate, resumed=resumed
    )
    early = chosen(kind_of=early_settings_of)
    check_limits(early)
    if early.evaluate.rescoring != "none" or early.evaluate.rescoring_options:
        from emcl.metrics.rescoring import check_rescoring  # NumPy: a tenth of a second, which no other start waits for

        check_rescoring(early.evaluate.rescoring, early.evaluate.rescoring_options)
    if options.init:
        _ = RunFolder.open(options.init).export
    if options.evaluate:
        RunFolder.open(options.evaluate).check_written()
        if _first():
            check_local(early.data, training=False)
        return chosen
    read_deepspeed(early)
    if options.dry_run:
        return chosen
    check_divisible(early.data.batch_size, int(os.environ.get("WORLD_SIZE", "1")), early.optim.accumulation)
    if resumed:
        return chosen
    if why := why_not_written(Path(early.runs) / "any"):
        raise UserError(f"runs={early.runs}: {why}")
    if early.name:  # a rank that comes here late finds it as the others did: nothing is saved before all have met
        RunFolder(Path(early.runs) / early.name).check_new()
    if _first():  # each rank's own disk is looked at once they have begun
        check_local(early.data)
    return chosen


def main(arguments: list[str] | None = None, command: str = LAUNCHED) -> int:
    """One rank from the command line to its end; the exit status. `--help` says `command`."""
    options = parse(arguments, command)
    # after the options: `--help` must not wait for torch
    from emcl.train.preemption import AGAIN, Stopped

    try:
        chosen = check(options)
        from emcl.train.plan import describe_plan
        from emcl.train.run import run

        if options.dry_run:
            if _first():
                print(describe_plan(chosen()))
            return 0
        run(
            options.task,
            recipe=options.recipe,
            overrides=options.overrides,
            evaluate_path=options.evaluate,
            resume=options.resume,
            init=options.init,
        )
    except Stopped as stopped:
        if _first():
            print(f"stopped: {stopped}", flush=True)
        return AGAIN
    except OneRankError as error:
        print(f"\nerror: {masked(one_line(error))}", file=sys.stderr, flush=True)  # a bar may be in this line
        return 2
    except UserError as error:
        if _first():  # one line, not one a rank
            print(f"error: {masked(one_line(error))}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher ends all ranks once one has ended, and the first has to say it
        return 2
    finally:
        if "emcl.distributed" in sys.modules:  # nothing of PyTorch's was needed for an early error
            sys.modules["emcl.distributed"].stop()
    return 0


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def train(arguments: list[str]) -> int:
    """`emcl train ...`: a rank on each of this machine's accelerators, once nothing is seen to be wrong.

    Raises:
        UserError: as `check`.
    """
    options = parse(arguments, "emcl train")
    check(options)
    return main(arguments) if options.dry_run else _become_launcher(arguments)


def evaluate(arguments: list[str]) -> int:
    """`emcl evaluate RUN ...`, as `train --evaluate RUN ...`."""
    parser = Parser(
        prog="emcl evaluate",
        description="Scores a run's best model on data.test, on this machine's accelerators.",
        epilog=ELSEWHERE,
        add_help=False,
    )
    add_help(parser)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or an export")
    parser.add_argument("--task", help="those of the run's tasks that are scored, joined by commas (default: all)")
    parser.add_argument("--recipe", help="settings of a recipe, in place of the run's own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as evaluate.dsl=true")
    options = parser.parse_intermixed_args(arguments)
    chosen = {"--task": options.task, "--recipe": options.recipe}
    passed_on = [text for option, value in chosen.items() if value for text in (option, value)]
    return train(["--evaluate", options.run, *passed_on, *options.overrides])


def _become_launcher(arguments: list[str]) -> NoReturn:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--module", "emcl.launch", *arguments]
    # as for any installed command, what lies in the working directory is not imported
    os.execve(launcher[0], launcher, {**os.environ, "PYTHONSAFEPATH": "1"})


if __name__ == "__main__":
    sys.exit(main(command=MODULE))
