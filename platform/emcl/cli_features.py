"""The command for people with embeddings of any model: transform."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emcl.arguments import check_out, number, whole
from emcl.errors import UserError

USUAL: dict[str, dict[str, Any]] = {
    "compact": {"bases": 64, "beta": 0.5, "balance": 0.0},
    "shared": {"bases": 128, "shrinkage": None, "logit_scale": 100.0},
}
"""The options of each variant, and their values where none is given."""
FITTING = ("fit_video", "fit_text", "bases", "beta", "balance", "shrinkage")
"""Options that say how to fit."""


def add_feature_commands(commands: Any) -> None:
    """Adds it to the parser of `emcl`."""
    transform = commands.add_parser(
        "transform",
        help="EMCL on feature files of any model: recall before and after",
        description="--variant compact: adds the compact EMCL's correction to rows of one space, whose cosine is "
        "ranked. --variant shared: finds factors that videos and texts share, writes the rows' codes, and ranks by the "
        "log-likelihood ratio of pairs; the rows may be of different spaces, or of one, where the cosine counts too. "
        "All files are .npy; rows are (n, D). Without --fit-video and --fit-text the bases are fitted to the very "
        "features that are given.",
    )
    transform.add_argument("--video", type=Path, required=True)
    transform.add_argument("--text", type=Path, required=True)
    transform.add_argument("--video-of-text", type=Path, help="each text's row of --video (default: row i's is row i)")
    transform.add_argument("--fit-video", type=Path, help="training features to fit the bases to")
    transform.add_argument("--fit-text", type=Path)
    transform.add_argument(
        "--fit-video-of-text", type=Path, help="each text's row of --fit-video (shared; default: row i's is row i)"
    )
    transform.add_argument("--load", type=Path, help="bases that an earlier call wrote, in place of fitting")
    transform.add_argument("--variant", choices=tuple(USUAL), default="compact", help="(default: %(default)s)")
    transform.add_argument("--bases", type=whole(ge=1), help=_each("K", "bases"))
    transform.add_argument("--beta", type=number(ge=0), help=_each("weight of the correction", "beta"))
    transform.add_argument(
        "--balance",
        type=number(ge=0, le=1),
        help=_each("0 keeps the spectrum, 1 makes it flat", "balance"),
    )
    transform.add_argument(
        "--shrinkage", type=number(gt=0), nargs=2, metavar=("VIDEO", "TEXT"),
        help="shared: how much of its mean variance each modality gets in all directions (default: chosen by folds)",
    )  # fmt: skip
    transform.add_argument(
        "--logit-scale",
        type=number(gt=0),
        help=_each("by which the cosine is log-odds, CLIP's if not told", "logit_scale"),
    )
    transform.add_argument("--out", type=Path, required=True, help="folder for video.npy, text.npy and the bases")
    transform.set_defaults(act=_transform)


def _each(what: str, name: str) -> str:
    """Help of an option, with the variants that have it and their defaults."""
    defaults = [f"{variant} {settings[name]:g}" for variant, settings in USUAL.items() if name in settings]
    return f"{what} (default: {', '.join(defaults)})"


def _transform(options: argparse.Namespace) -> None:
    check_out(options.out, folder=True)
    settings = _settings(options)
    if (options.fit_video is None) != (options.fit_text is None):
        raise UserError("--fit-video and --fit-text go together: the bases are those of both modalities")
    if options.fit_video_of_text and (options.fit_video is None or options.variant != "shared"):
        raise UserError("--fit-video-of-text goes with --variant shared, --fit-video and --fit-text")
    given = [name for name in FITTING if getattr(options, name) is not None]
    if options.load and given:
        raise UserError(f"--load brings fitted bases: leave out --{given[0].replace('_', '-')}")
    _shared(options, **settings) if options.variant == "shared" else _compact(options, **settings)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Those of the variant; raises UserError for another's."""
    usual = USUAL[options.variant]
    for variant, settings in USUAL.items():
        for name in settings:
            if name not in usual and getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is an option of --variant {variant}")
    return {name: value if getattr(options, name) is None else getattr(options, name) for name, value in usual.items()}


def _compact(options: argparse.Namespace, **settings: Any) -> None:
    from emcl.evaluate.feature_files import Features, read_owner
    from emcl.evaluate.out_of_the_box import comparison, fit, open_layer, recall, transform, write

    features = Features.read(options.video, options.text, one_space=True)
    owner = read_owner(options.video_of_text, features, "--video-of-text")
    if options.load:
        layer = open_layer(options.load)
    else:
        fitted = features
        if options.fit_video:
            fitted = Features.read(options.fit_video, options.fit_text, one_space=True)
        else:
            print("bases fitted to the scored features themselves: transductive (--fit-video, --fit-text avoid that)")
        layer = fit(fitted, **settings)
    after = transform(layer, features)
    write(options.out, after, layer)
    print(comparison({"before": recall(features, owner), "after": recall(after, owner)}))
    print(f"written: {options.out}/video.npy, text.npy, bases.pt")


def _shared(options: argparse.Namespace, *, logit_scale: float, **settings: Any) -> None:
    from emcl.evaluate.feature_files import Features, read_owner
    from emcl.evaluate.out_of_the_box import codes, comparison, fit_factors, open_factors, recall_with, write

    features = Features.read(options.video, options.text)
    owner = read_owner(options.video_of_text, features, "--video-of-text")
    if options.load:
        factors = open_factors(options.load)
    elif options.fit_video:
        fitted = Features.read(options.fit_video, options.fit_text)
        factors = fit_factors(fitted, read_owner(options.fit_video_of_text, fitted, "--fit-video-of-text"), **settings)
    else:
        factors = fit_factors(features, owner, **settings)
    scored = bool(options.load or options.fit_video)
    if options.logit_scale is not None and not (scored and features.same_width):
        raise UserError("--logit-scale is for features of one space that other pairs' factors score")
    written = codes(factors, features)
    write(options.out, written, factors)
    pairs, (s_v, s_t) = factors.facts["pairs"], factors.facts["shrinkage"]
    found = f"{len(factors.correlation)} factors of {pairs:,} pairs, shrinkage {s_v:g} and {s_t:g}"
    print(f"{found}, correlations {factors.correlation[0]:.2f} to {factors.correlation[-1]:.2f}")
    if scored:
        print(comparison(recall_with(factors, features, owner, logit_scale)))
    else:
        print("fitted to these very pairs, so that their recall would say nothing: --fit-video, --fit-text, or --load")
    print(f"written: {options.out}/video.npy, text.npy (codes), factors.npz")
