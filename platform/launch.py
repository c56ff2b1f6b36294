"""Trains or evaluates: `deepspeed platform/launch.py --task retrieval [key=value ...]`.

deepspeed platform/launch.py --task retrieval                      the sample set, end to end
deepspeed platform/launch.py --task retrieval optim.lr=1e-4 emcl.k=16 deepspeed=configs/deepspeed/zero3.json
deepspeed platform/launch.py --task retrieval --evaluate runs/NAME
deepspeed platform/launch.py --task retrieval --resume
deepspeed platform/launch.py --recipe msrvtt_retrieval data.root=shards/msrvtt --dry-run      what it would take
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from emcl.arguments import Parser, add_help, task_names, whole

    parser = Parser(
        prog="launch.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    add_help(parser)
    parser.add_argument(
        "--task",
        type=task_names,
        help="one or several of `emcl tasks`, joined by commas, or `all`; a benchmark's recipe names its own",
    )
    parser.add_argument("--recipe", default=None, help="a file of configs/recipe, or a path (default: sample)")
    parser.add_argument(
        "--evaluate", metavar="PATH", type=Path, help="score a run's folder or an export on data.test; no training"
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
        const="auto",
        metavar="RUN",
        help="continue a run's folder (the newest of runs/ without RUN)",
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
    options = parser.parse_intermixed_args(arguments)
    if options.profile:
        options.overrides.append(f"tracking.profile={options.profile}")
    if not (options.task or options.recipe or options.evaluate or options.resume):
        parser.error("--task NAME or --recipe NAME is needed, such as --task retrieval")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # after the options: `--help` must not wait for torch
    from emcl.data.at_hand import check_local
    from emcl.data.order import check_divisible
    from emcl.errors import OneRankError, UserError, one_line
    from emcl.model.limits import check_limits
    from emcl.registry import early_settings_of
    from emcl.secrets import masked
    from emcl.train.deepspeed_file import read_deepspeed
    from emcl.train.folders import config_of_run, find_run
    from emcl.train.stop import AGAIN, Stopped

    try:
        resumed = find_run(options.resume) if options.resume else None
        chosen = partial(
            config_of_run, options.task, options.recipe, options.overrides, evaluate=options.evaluate, resumed=resumed
        )
        early = chosen(kind_of=early_settings_of)
        check_limits(early)
        if not options.evaluate:
            read_deepspeed(early)
        if not (options.evaluate or options.dry_run):
            check_divisible(early.data.batch_size, int(os.environ.get("WORLD_SIZE", "1")), early.optim.accumulation)
            if not resumed and os.environ.get("RANK", "0") == "0":  # `run` looks on every rank
                check_local(early.data)
        from emcl.train.plan import describe_plan
        from emcl.train.run import run

        if options.dry_run:
            if os.environ.get("RANK", "0") == "0":
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
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {stopped}", flush=True)
        return AGAIN
    except OneRankError as error:
        print(f"\nerror: {masked(one_line(error))}", file=sys.stderr, flush=True)  # a bar may be in this line
        return 2
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # one line, not one a rank
            print(f"error: {masked(one_line(error))}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher ends all ranks once one has ended, and the first has to say it
        return 2
    finally:
        if "emcl.distributed" in sys.modules:  # nothing of PyTorch's was needed for an early error
            sys.modules["emcl.distributed"].stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
