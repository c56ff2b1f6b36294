"""Measures the effect of EMCL: `make ablation`.

The towers are frozen and their outputs computed once; every variant has the same steps and data order; several seeds.
Settings are swept on validation videos; the table is for the test set. Trained models stay in
benchmarks/results/ablation, so an interrupted call can be resumed. Writes tables (Markdown, JSON), plots, and one
MLflow experiment per data set.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two runs in parallel are faster than one run on two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from tqdm import tqdm

import ablation_figures
from ablation_data import SETS, DataSet
from ablation_models import (
    Job,
    Measured,
    embed,
    fitted,
    measure,
    plain,
    train,
    with_fitted,
    with_own_layer,
    with_reference,
)
from ablation_statistics import paired_bootstrap
from emcl.em import EMCL
from emcl.errors import UserError
from emcl.model.embeddings import Embeddings
from emcl.model.emcl_layer import EMCLLayer
from emcl.tracking import open_tracker
from emcl.train.export import open_export

REFERENCE_INFERENCE: dict[str, Any] = {"bases": 7, "iterations": 10, "temperature": 0.1, "beta": 4.0}
"""Settings of the published inference module."""
COMPACT_INFERENCE: dict[str, Any] = {"bases": 64, "balance": 0.0, "beta": 0.5}
"""Chosen on the validation videos (see the sweeps)."""
SWEPT_INFERENCE: dict[str, Any] = {"bases": 128, "balance": 0.0, "beta": 0.5}
"""Base settings of the inference sweeps, which vary one at a time."""
JOINT = {
    "none": ("emcl.enabled=false",),
    "reference": ("emcl.variant=reference",),
    "compact": ("emcl.variant=compact", "emcl.balance=0.5", "emcl.beta=4", "emcl.iterations=2"),
}
"""Settings of each kind of training; compact's were chosen on the validation videos."""
SWEPT = {**JOINT, "compact": (*JOINT["compact"], "emcl.beta=1")}
"""Base settings of the training sweeps, which vary one at a time."""
SWEEP_SEEDS = 2
SWEEPS: dict[str, tuple[tuple[str, str, tuple[float, ...]], ...]] = {
    "K": (("compact", "emcl.bases", (4, 16, 32, 64, 128, 256)),),
    "T": (("compact", "emcl.iterations", (1, 2, 8)), ("reference", "emcl.iterations", (1, 9))),
    "lambda": (("reference", "emcl.temperature", (0.1, 1.0, 10.0)),),
    "beta": (("compact", "emcl.beta", (0.5, 1.0, 2.0, 4.0, 8.0)), ("reference", "emcl.beta", (1.0, 3.0, 9.0))),
}
INFERENCE_SWEEPS: dict[str, tuple[str, tuple[float, ...]]] = {
    "K": ("bases", (4, 8, 16, 32, 64, 128, 256)),
    "beta": ("beta", (0.25, 0.5, 1.0, 2.0)),
}
OUT = Path("benchmarks/results/ablation")
ROWS = (
    "no EMCL",
    "no EMCL, DSL",
    "reference, joint",
    "compact, joint",
    "compact, joint, DSL",
    "reference, at inference",
    "compact, at inference",
)


def jobs_of(data: DataSet, seeds: Iterable[int], *, training: str, folder: Path) -> dict[tuple[str, int], Job]:
    """The models of the table."""
    return {
        (kind, seed): job(data, f"{kind}-{seed}", seed, settings, training=training, folder=folder)
        for kind, settings in JOINT.items()
        for seed in seeds
    }


def job(data: DataSet, name: str, seed: int, settings: Sequence[str], *, training: str, folder: Path) -> Job:
    own: tuple[str, ...] = (f"data.train={training}", f"seed={seed}")
    if "emcl.variant=compact" in settings:
        own = (*own, f"emcl.bases={data.bases}")
    return Job(name, data.recipe, (*data.settings, *own, *settings), folder)


def train_all(jobs: Sequence[Job], processes: int, what: str) -> None:
    """Trains the missing models, several in parallel."""
    missing = list({job.name: job for job in jobs if not job.export.is_dir()}.values())
    if not missing:
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(tqdm(pool.map(train, missing), total=len(missing), desc=what, unit="run"))


# --- the table


def measure_seed(data: DataSet, folder: Path, seed: int) -> dict[str, dict[str, Measured]]:
    """Every row of the table for one seed: `one` or `all` sentences -> row -> measurement."""
    torch.set_num_threads(1)
    jobs = jobs_of(data, [seed], training=data.train, folder=folder)
    measured: dict[str, dict[str, Measured]] = {"one": {}, "all": {}}
    for kind in JOINT:
        model, config = open_export(jobs[kind, seed].export)
        every = embed(model, config, data.test)
        one = embed(model, config, data.test_pairs) if data.test_pairs else every.one_sentence()
        layer = fitted(embed(model, config, data.train, 4), **COMPACT_INFERENCE) if kind == "none" else None
        measured["one"].update(measure_model(kind, model, one, layer))
        measured["all"].update(measure_model(kind, model, every, layer))
    return measured


def measure_model(kind: str, model: Any, split: Embeddings, inference: EMCLLayer | None) -> dict[str, Measured]:
    own = model.heads["retrieval"].emcl
    if kind != "none":
        scores = with_own_layer(model, split)
        measured = {f"{kind}, joint": measure(scores, split, own, dsl=False)}
        if kind == "compact":
            measured["compact, joint, DSL"] = measure(scores, split, own, dsl=True)
        return measured
    assert inference is not None
    reference = EMCL(**REFERENCE_INFERENCE).eval()
    scores = plain(model, split)
    return {
        "no EMCL": measure(scores, split, _nothing, dsl=False),
        "no EMCL, DSL": measure(scores, split, _nothing, dsl=True),
        "reference, at inference": measure(
            with_reference(model, split, **REFERENCE_INFERENCE), split, _on_unit_rows(reference), dsl=False
        ),
        "compact, at inference": measure(with_fitted(model, split, inference), split, inference, dsl=False),
    }


def _nothing(*rows: torch.Tensor) -> Sequence[torch.Tensor]:
    return rows


def _on_unit_rows(layer: EMCL) -> Callable[..., Sequence[torch.Tensor]]:
    return lambda *rows: layer(*(torch.nn.functional.normalize(matrix, dim=1) for matrix in rows))


@dataclass(frozen=True)
class Line:
    """A row of the table: mean and standard deviation over seeds, and the difference to no EMCL."""

    name: str
    values: dict[str, tuple[float, float]]
    difference: dict[str, float] | None


def line(name: str, seeds: Sequence[dict[str, Measured]]) -> Line:
    measured = [seed[name] for seed in seeds]
    values = {
        "t2v R@1": [100 * float((one.text_to_video == 1).mean()) for one in measured],
        "v2t R@1": [100 * float((one.video_to_text == 1).mean()) for one in measured],
        "mean R@1": [one.recall for one in measured],
        "t2v MdR": [float(np.median(one.text_to_video)) for one in measured],
        "v2t MdR": [float(np.median(one.video_to_text)) for one in measured],
        "gap": [one.gap for one in measured],
        "effective rank": [one.effective_rank for one in measured],
    }
    against = None
    if name != ROWS[0]:
        against = vars(paired_bootstrap(measured, [seed[ROWS[0]] for seed in seeds]))
    spread = {
        key: (float(np.mean(all_)), float(np.std(all_, ddof=min(1, len(all_) - 1)))) for key, all_ in values.items()
    }
    return Line(name, spread, against)


def markdown(lines: Sequence[Line], title: str) -> str:
    heads = list(lines[0].values)
    rows = [
        f"### {title}",
        "",
        f"| | {' | '.join(heads)} | mean R@1 against no EMCL (95%), p |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for one in lines:
        cells = [f"{mean:.2f} ± {spread:.2f}" for mean, spread in one.values.values()]
        d = one.difference
        against = "" if d is None else f"{d['mean']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f}), {d['p']:.4f}"
        rows.append(f"| {one.name} | {' | '.join(cells)} | {against} |")
    return "\n".join(rows)


def track(data: DataSet, jobs: dict[tuple[str, int], Job], seed: int, measured: dict[str, dict[str, Measured]]) -> None:
    """One MLflow run for each row and seed."""
    for name in ROWS:
        kind = "none" if "no EMCL" in name or "at inference" in name else name.split(",")[0]
        config = resolved(jobs[kind, seed], f"ablation-{data.name}")
        tracker = open_tracker(config, f"{name}, seed {seed}", first_rank=True)
        tracker.tag("variant", name)
        for sentences, rows in measured.items():
            values = line(name, [rows]).values
            tracker.metrics({f"{sentences}/{key.replace(' ', '_')}": mean for key, (mean, _) in values.items()}, 0)
        tracker.finish()


def resolved(job: Job, experiment: str) -> Any:
    import dataclasses

    config = job.config()
    return dataclasses.replace(
        config, tracking=dataclasses.replace(config.tracking, enabled=True, experiment=experiment)
    )


def table(data: DataSet, seeds: int, processes: int) -> None:
    folder = OUT / data.name / "models"
    jobs = jobs_of(data, range(seeds), training=data.train, folder=folder)
    train_all(list(jobs.values()), processes, f"{data.name}, table")
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(measure_seed, data, folder, seed) for seed in range(seeds)]
        measured = [one.result() for one in tqdm(waiting, desc=f"{data.name}, scoring", unit="seed")]
    for seed, one in enumerate(measured):
        track(data, jobs, seed, one)
    texts = []
    result = {}
    for sentences in ("one", "all"):
        lines = [line(name, [one[sentences] for one in measured]) for name in ROWS]
        counted = measured[0][sentences][ROWS[0]]
        title = f"{data.title}: {len(counted.owner)} texts x {len(counted.video_to_text)} videos, {seeds} seeds"
        texts.append(markdown(lines, title))
        result[sentences] = {one.name: {**one.values, "against no EMCL": one.difference} for one in lines}
    text = "\n\n".join(texts) + "\n"
    (OUT / data.name / "table.md").write_text(text)
    (OUT / data.name / "table.json").write_text(json.dumps(result, indent=1))
    print("\n" + text)
    first = {kind: jobs[kind, 0] for kind in ("none", "compact")}
    ablation_figures.draw_space(OUT / data.name / "space.png", first, data.test, COMPACT_INFERENCE, data.train)


# --- the sweeps, on validation videos


def sweeps(data: DataSet, processes: int) -> None:
    folder = OUT / data.name / "sweeps"
    points: dict[str, list[tuple[str, float, int, Job]]] = {}
    for axis, kinds in SWEEPS.items():
        for kind, key, values in kinds:
            for value in values:
                for seed in range(SWEEP_SEEDS):
                    settings = (*SWEPT[kind], f"{key}={value:g}")
                    name = f"{kind}-{key.rpartition('.')[2]}-{value:g}-{seed}"
                    made = job(data, name, seed, settings, training=data.sweep_train, folder=folder)
                    usual = job(data, f"{kind}-{seed}", seed, SWEPT[kind], training=data.sweep_train, folder=folder)
                    if made.config().emcl == usual.config().emcl:  # the base training is shared by all axes
                        made = usual
                    points.setdefault(axis, []).append((f"{kind}, joint", value, seed, made))
    bases = {
        seed: job(data, f"none-{seed}", seed, SWEPT["none"], training=data.sweep_train, folder=folder)
        for seed in range(SWEEP_SEEDS)
    }
    every = [made for axis_points in points.values() for *_, made in axis_points]
    train_all([*bases.values(), *every], processes, f"{data.name}, sweeps")
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        of_job = {}
        for made in {one.name: one for one in every}.values():
            of_job[made.name] = pool.submit(score_joint, made, data.val)
        of_base = {seed: pool.submit(score_inference, base, data.sweep_train, data.val) for seed, base in bases.items()}
        result: dict[str, Any] = {"no EMCL": [one.result()["plain"] for one in of_base.values()]}
        for axis, axis_points in points.items():
            for label, value, _, made in axis_points:
                result.setdefault(axis, {}).setdefault(label, {}).setdefault(f"{value:g}", []).append(
                    of_job[made.name].result()
                )
            if axis in INFERENCE_SWEEPS:
                for value in INFERENCE_SWEEPS[axis][1]:
                    result[axis].setdefault("compact, at inference", {})[f"{value:g}"] = [
                        one.result()[f"{axis}={value:g}"] for one in of_base.values()
                    ]
    (OUT / data.name / "sweeps.json").write_text(json.dumps(result, indent=1))
    title = f"{data.name}: validation videos, {SWEEP_SEEDS} seeds"
    ablation_figures.draw_sweeps(OUT / data.name / "sweeps.png", result, title)
    print(json.dumps(result, indent=1))


def score_joint(made: Job, val: str) -> float:
    """R@1 on validation, cached next to the model."""
    kept = made.folder / made.name / "validation.json"
    if not kept.is_file():
        kept.write_text(json.dumps(_score_joint(made, val)))
    return float(json.loads(kept.read_text()))


def _score_joint(made: Job, val: str) -> float:
    torch.set_num_threads(1)
    model, config = open_export(made.export)
    split = embed(model, config, val)
    return measure(with_own_layer(model, split), split, _nothing, dsl=False).recall


def score_inference(made: Job, training: str, val: str) -> dict[str, float]:
    torch.set_num_threads(1)
    model, config = open_export(made.export)
    split, fit_on = embed(model, config, val), embed(model, config, training, 4)
    recalls = {"plain": measure(plain(model, split), split, _nothing, dsl=False).recall}
    for axis, (key, values) in INFERENCE_SWEEPS.items():
        for value in values:
            settings = {**SWEPT_INFERENCE, key: int(value) if key == "bases" else value}
            scores = with_fitted(model, split, fitted(fit_on, **settings))
            recalls[f"{axis}={value:g}"] = measure(scores, split, _nothing, dsl=False).recall
    return recalls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1)))
    parser.add_argument("--msrvtt", type=Path, help="folder of MSR-VTT's annotations, if its shards are to be made")
    parser.add_argument("--frames", type=Path, help="tar of MSR-VTT's key frames as videos")
    parser.add_argument("--parts", nargs="+", choices=("table", "sweeps"), default=["table", "sweeps"])
    options = parser.parse_args()
    for name in options.sets:
        data = SETS[name]
        (OUT / name).mkdir(parents=True, exist_ok=True)
        try:
            data.make(options.msrvtt, options.frames)
        except UserError as error:
            sys.exit(f"error: {error}")
        if "table" in options.parts:
            table(data, options.seeds, options.processes)
        if "sweeps" in options.parts:
            sweeps(data, options.processes)


if __name__ == "__main__":
    main()
