"""One model for three tasks compared with three single-task models, at equal steps: `make together`.

Every run sees the same videos in the same order; only the tasks differ. The table also has controls for captions and
answers: the best single sentence for all videos, shuffled videos, and questions without their video. Existing runs are
not repeated. Writes a table (Markdown, JSON) to benchmarks/results/together-RECIPE.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from pycocoevalcap.cider.cider import Cider

from emcl.config import resolve
from emcl.data.mixture import open_training
from emcl.data.shards import open_shards
from emcl.metrics.caption_metrics import caption_metrics, plain_tokens
from emcl.run_folder import RUNS, RunFolder

TASKS = ("retrieval", "captioning", "msrvtt_qa")
CHOSEN = {
    "retrieval": ("text_to_video/R@1", "text_to_video/R@5", "text_to_video/MdR", "video_to_text/R@1"),
    "captioning": ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr"),
    "msrvtt_qa": ("accuracy", "accuracy_in_vocabulary", "top_5", "most_frequent"),
}
CANDIDATES, SHORT_LIST, SUBSET = 300, 10, 100


def launch(tasks: str, name: str, *settings: str) -> None:
    """Trains with the user's command line (or scores, with --evaluate among the settings)."""
    command = ["deepspeed", "--num_accelerators", "1", "platform/launch.py", "--task", tasks, f"name={name}", *settings]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:])


def scores(name: str, split: str = "test") -> dict[str, dict[str, float]]:
    by_task = json.loads(RunFolder(Path(RUNS) / name).scores(split).read_text())["tasks"]
    return {task: item["metrics"] for task, item in by_task.items()}


def run_name(tasks: str, recipe: str, seed: int, label: str = "") -> str:
    return f"together-{Path(recipe).stem}-{label or tasks.replace(',', '+')}-{seed}"


def trained(tasks: str, recipe: str, seed: int, *extra: str, label: str = "") -> tuple[dict[str, Any], float]:
    """Test scores, and the minutes of training if known, else NaN."""
    name = run_name(tasks, recipe, seed, label)
    folder = RunFolder(Path(RUNS) / name)
    taken = folder.path / "minutes"
    if not folder.scores("test").is_file():
        began = time.perf_counter()
        cut_short = folder.whole_checkpoints()
        launch(tasks, name, *(["--resume", str(folder)] if cut_short else ["--recipe", recipe, f"seed={seed}", *extra]))
        if not cut_short:
            taken.write_text(str((time.perf_counter() - began) / 60))
    return scores(name), float(taken.read_text()) if taken.is_file() else float("nan")


def swapped(tasks: str, recipe: str, seed: int) -> dict[str, dict[str, float]]:
    """The joint model's scores with shuffled videos."""
    name = run_name(tasks, recipe, seed)
    folder = RunFolder(Path(RUNS) / name)
    if not folder.scores("test-swapped").is_file():
        launch(tasks, name, "--evaluate", str(folder), "evaluate.swap_videos=true")
    return scores(name, "test-swapped")


def best_fixed_sentence(recipe: str) -> tuple[str, dict[str, float]]:
    """The training sentence that scores best as caption of every test video; chosen on the test set, to be strict."""
    config = resolve(["captioning"], recipe)
    training = open_training(config.data, config.seed)[0]
    counted = Counter(text for row in training.rows for text in row.sample.captions)
    candidates = [text for text, _ in counted.most_common(CANDIDATES)]
    assert config.data.test is not None
    rows = [row.sample for row in open_shards(config.data.test).rows if row.sample.captions]
    references = {str(number): sample.captions for number, sample in enumerate(rows)}

    plain = {key: [plain_tokens(text) for text in texts] for key, texts in references.items()}

    def cider(text: str, keys: Sequence[str]) -> float:
        spoken = {key: [plain_tokens(text)] for key in keys}
        return float(Cider().compute_score({key: plain[key] for key in keys}, spoken)[0])

    keys = list(references)
    some = keys[:: max(1, len(keys) // SUBSET)]
    short = sorted(candidates, key=lambda text: -cider(text, some))[:SHORT_LIST]
    best = max(short, key=lambda text: cider(text, keys))
    metrics = caption_metrics(dict.fromkeys(keys, best), references).metrics
    return best, {name: 100 * value for name, value in metrics.items()}


def table(recipe: str, seeds: list[int], changes: list[str], at_once: int) -> tuple[str, dict[str, Any]]:
    together, no_video = ",".join(TASKS), "tasks.msrvtt_qa.use_video=false"
    with ThreadPoolExecutor(at_once) as pool:  # each run trains in a separate process
        started = {
            (kind, seed): pool.submit(trained, kind, recipe, seed, *changes)
            for seed in seeds
            for kind in (together, *TASKS)
        }
        questions = [
            pool.submit(trained, "msrvtt_qa", recipe, seed, *changes, no_video, label="questions") for seed in seeds
        ]
    runs = {key: future.result() for key, future in started.items()}
    joint = [runs[together, seed] for seed in seeds]
    single = {task: [runs[task, seed] for seed in seeds] for task in TASKS}
    blind = [future.result()[0] for future in questions]
    other = swapped(together, recipe, seeds[0])
    sentence, fixed = best_fixed_sentence(recipe)
    results: dict[str, Any] = {"joint": joint, "single": single, "questions": blind, "swapped": other, "fixed": fixed}

    def spread(values: list[float]) -> str:
        return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")

    lines = ["| | joint | alone | control |", "|---|---|---|---|"]
    for task in TASKS:
        for metric in CHOSEN[task]:
            controls = []
            if task == "captioning":
                controls = [f"{fixed[metric]:.1f} one sentence", f"{other[task][metric]:.1f} swapped"]
            elif task == "msrvtt_qa" and metric != "most_frequent":
                without = spread([item[task][metric] for item in blind])
                controls = [f"{without} question alone", f"{other[task][metric]:.1f} swapped"]
            ours = spread([item[task][metric] for item, _ in joint])
            alone = spread([item[task][metric] for item, _ in single[task]])
            lines.append(f"| {task} {metric} | {ours} | {alone} | {', '.join(controls)} |")
    minutes = {task: [taken for _, taken in runs] for task, runs in {"joint": joint, **single}.items()}
    took = ", ".join(f"{name} {np.mean(values):.1f}" for name, values in minutes.items())
    lines += ["", f"Minutes a run, tests included: {took}. The one sentence: {sentence!r}."]
    return "\n".join(lines), results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="sample")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-once", type=int, default=1, help="runs beside each other (OMP_NUM_THREADS says how wide)")
    parser.add_argument("set", nargs="*", metavar="key=value", help="settings of every run, such as optim.epochs=6")
    options = parser.parse_args()
    text, results = table(options.recipe, options.seeds, options.set, options.at_once)
    print(text)
    folder = Path("benchmarks/results") / f"together-{Path(options.recipe).stem}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n")
    (folder / "table.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
