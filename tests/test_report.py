"""`emcl report` and `emcl options` on a run trained here: figures, intervals, pages, and what they say is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from emcl.tasks.retrieval_plots import embeddings_of, similarity_of

from conftest import launch, small
from emcl.cli import main
from emcl.errors import UserError
from emcl.metrics.bootstrap import interval
from emcl.metrics.retrieval_metrics import retrieval_metrics
from emcl.model.embeddings import Embeddings
from emcl.registry import task_class
from emcl.report.page import compare, report_of, write_report
from emcl.task.task_result import open_results

pytestmark = pytest.mark.xdist_group("report")


@pytest.fixture(scope="module")
def run(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three tasks, a few steps, scored on 12 clips."""
    folder = tmp_path_factory.mktemp("report")
    settings = [
        "--task", "all", *small(sample_shards), "data.val=null", "name=one", "evaluate.dsl=true", "emcl.bases=8",
        "tasks.captioning.width=64", "tasks.captioning.layers=1", "tasks.captioning.generation.max_new_tokens=6",
    ]  # fmt: skip
    done = launch(*settings, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "runs" / "one"


def test_kept_embeddings_and_similarity_give_the_scores_again(run: Path) -> None:
    (retrieval,) = (result for result in open_results(run) if result.task == "retrieval")
    similarity, embeddings = similarity_of(retrieval), embeddings_of(retrieval)
    assert similarity is not None and embeddings is not None
    again = retrieval_metrics(similarity, embeddings.owner)
    assert again["text_to_video"]["R@1"] == retrieval.metrics["text_to_video/R@1"]
    assert again["video_to_text"]["MnR"] == retrieval.metrics["video_to_text/MnR"]
    assert np.mean(retrieval.items["text_to_video"]) == pytest.approx(retrieval.metrics["text_to_video/MnR"])


def test_items_add_up_to_the_metrics(run: Path) -> None:
    results = {result.task: result for result in open_results(run)}
    answers = results["msrvtt_qa"]
    assert np.mean(answers.items["accuracy"]) == pytest.approx(answers.metrics["accuracy"])
    captions = results["captioning"]
    name = next(name for name in captions.metrics if name.startswith("CIDEr"))
    assert np.mean(captions.items[name]) == pytest.approx(captions.metrics[name])
    for result in results.values():
        for metric, (low, high) in report_of(result).intervals(result).items():
            assert low <= result.metrics[metric] <= high


def test_the_page_holds_tables_plots_examples_and_the_protocol(run: Path, tmp_path: Path) -> None:
    page, text = write_report([run], tmp_path)
    html = page.read_text()
    for wanted in ("Recall at k", "Modality gap", "Similarity of texts", "Best", "Worst", '<img src="data:image/jpeg'):
        assert wanted in html, wanted
    assert "ties count against" in html and "ties count against" in text
    assert "NOT COMPARABLE with published figures" in text
    assert "one, DSL" in text and "transductive" in text
    assert 'src="http' not in html  # it opens without a network


def test_the_published_figures_stand_beside_ours_and_only_a_whole_test_set_compares(run: Path) -> None:
    summary = json.loads((run / "scores-test.json").read_text())
    results = open_results(run)
    changed = [result for result in results if result.task == "retrieval"]
    from dataclasses import replace

    full = replace(changed[0], benchmark="msrvtt", split="1k-A", samples=1000)
    partial = replace(full, samples=476)
    (table,) = compare([full, partial])
    assert [line.note for line in table.lines if line.ours and "DSL" not in line.name] == [
        "",
        "NOT COMPARABLE with published figures: 476 of 1,000 test videos",
    ]
    paper = next(line for line in table.lines if line.name == "EMCL-Net")
    assert paper.cells[table.columns.index("t2v R@1")] == ("46.8", "")
    assert summary["samples"] == 12


def test_what_a_sample_says_cannot_become_markup(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "<b>r|un"
    shutil.copytree(run, copied)
    path = copied / "items-msrvtt_qa-test.json"
    items = json.loads(path.read_text())
    items["question"] = ["<script>alert(1)</script> | what"] * len(items["question"])
    path.write_text(json.dumps(items))
    page, text = write_report([copied], tmp_path / "out")
    html = page.read_text()
    assert "<script>" not in html and "&lt;script&gt;" in html and "<b>r" not in html
    rows = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    for head, row in zip(rows, rows[2:], strict=False):  # a name with a bar adds no cell
        if row.startswith("| <b>") and head.startswith("| |"):
            assert row.count("|") == head.count("|")
    assert sum(row.startswith("| <b>run") for row in rows) >= 3


def test_a_report_without_shards_or_kept_scores_leaves_out_what_it_lacks(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "bare"
    shutil.copytree(run, copied)
    for name in ("similarity-test.safetensors", "embeddings-test.safetensors"):
        (copied / name).unlink()
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(re.sub(r"test: .*", "test: gone/test-*.tar", config))
    html = write_report([copied], tmp_path / "out")[0].read_text()
    assert "Recall at k" in html and "Modality gap" not in html and "image/jpeg" not in html


def test_a_folder_without_scores_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert "emcl evaluate" in capsys.readouterr().err
    with pytest.raises(UserError, match="emcl evaluate"):
        Embeddings.open(tmp_path / "embeddings-test.safetensors")


def test_every_option_in_one_table_and_again_without_encoding(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(run, tmp_path / "one")
    assert main(["options", str(run), "--bank", "10"]) == 0
    first = capsys.readouterr().out
    lines = [line.split(" | ") for line in first.splitlines()[2:]]
    assert len(lines) == 12  # 4 ways of EMCL by 3 rescorings
    kinds = {(line[0].strip("| "), line[1]): line[2] for line in lines}
    assert kinds["none", "none"] == kinds["none", "QB-Norm"] == "inductive"
    assert kinds["none", "DSL"] == kinds["its own (reference)", "none"] == "transductive"
    kept = json.loads((run / "options-test.json").read_text())
    options = {(option["emcl"], option["rescoring"]): option for option in kept}
    metrics = next(result.metrics for result in open_results(run) if result.task == "retrieval")
    own = options["its own (reference)", "none"]["metrics"]["text_to_video"]
    dual = options["its own (reference)", "DSL"]["metrics"]["video_to_text"]
    assert own["MnR"] == pytest.approx(metrics["text_to_video/MnR"])
    assert dual["MnR"] == pytest.approx(metrics["video_to_text_dsl_transductive/MnR"])
    bank = (run / "embeddings-bank.safetensors").stat().st_mtime_ns
    assert main(["options", str(run), "--bank", "10"]) == 0
    assert capsys.readouterr().out == first
    assert (run / "embeddings-bank.safetensors").stat().st_mtime_ns == bank
    assert main(["options", str(run), "--bank", "6"]) == 0  # another bank is another one, not the kept
    assert len(Embeddings.open(run / "embeddings-bank.safetensors").videos) == 6


def test_embeddings_come_back_as_they_were(tmp_path: Path) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    kept = Embeddings(
        torch.randn(3, 4),
        torch.randn(2, 3, 4) * mask[..., None],
        mask,
        np.array([0, 0, 1]),
        ["a", "ü", "c"],
        ["x", "y"],
    )
    kept.save(tmp_path / "e.safetensors")
    opened = Embeddings.open(tmp_path / "e.safetensors")
    assert torch.equal(opened.frames, kept.frames) and torch.equal(opened.text, kept.text)
    assert opened.sentences == kept.sentences and opened.videos == kept.videos
    assert opened.owner.tolist() == [0, 0, 1]


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = sum(low <= 0.3 <= high for low, high in (interval(rng.random(200) < 0.3) for _ in range(200)))
    assert 180 <= held <= 198  # 95% of 200 is 190


def test_queries_of_one_video_are_drawn_together() -> None:
    videos = np.repeat(np.arange(20), 50)
    hits = (videos % 2).astype(float)  # all queries of a video agree: 20 facts, not 1,000
    alone, together = interval(hits), interval(hits, videos)
    assert together[1] - together[0] > 4 * (alone[1] - alone[0])


@pytest.mark.parametrize("task", ["retrieval", "captioning", "msrvtt_qa"])
def test_published_figures_are_of_known_benchmarks_and_metrics(task: str) -> None:
    from emcl.prepare.benchmarks import BENCHMARKS

    report = task_class(task).report
    known = {*report.columns, "text_to_video/R@50", "video_to_text/R@50"}
    for (benchmark, protocol), lines in report.published.items():
        assert protocol in BENCHMARKS[benchmark].protocols
        assert all(set(line.metrics) <= known for line in lines)
    assert report.published
