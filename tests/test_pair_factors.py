"""Shared factors in the product: found after training, kept in the export, counted wherever a score is made."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import emcl
from conftest import small
from emcl.cli import main
from emcl.config import Config, resolve
from emcl.data.batch import number_of
from emcl.data.loader import Clips
from emcl.data.sampler import Draw
from emcl.data.shards import open_shards
from emcl.data.split import open_split
from emcl.distributed import ALONE, Ranks
from emcl.em import SharedFactors
from emcl.errors import UserError
from emcl.evaluate.driver import collect, evaluate
from emcl.features import VideoFeatures
from emcl.inference import VideoTextModel
from emcl.metrics.choice_recall import choice_recall
from emcl.metrics.retrieval_metrics import retrieval_metrics
from emcl.model.backbone import tokenizer_of
from emcl.model.embeddings import Embeddings
from emcl.model.pair_scores import FACTOR_WEIGHTS, NO_FACTORS, check_fit, fingerprint_of, weight_of
from emcl.multitask import VideoLanguageModel
from emcl.prepare.clips import Clip
from emcl.prepare.table import read_table
from emcl.prepare.writer import write_shard
from emcl.report.options import every_option
from emcl.run_folder import EMBEDDINGS, FACTORS, SIMILARITY, RunFolder
from emcl.search.index import VideoIndex
from emcl.search.windows import Windows
from emcl.task.task_result import open_results
from emcl.train.export import open_export
from emcl.train.pair_factors import GRID, find_factors, fit_factors, open_factors
from emcl.train.run import run
from ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("factors")
CPU = torch.device("cpu")
FROZEN = ["model.frozen=[image,text]", "data.val=null", "optim.max_steps=2", "emcl.variant=compact", "emcl.bases=8"]


@pytest.fixture(scope="module")
def trained(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose towers are as they were drawn: its factors have weight 1."""
    folder = tmp_path_factory.mktemp("factors")
    run(["retrieval"], overrides=[*small(sample_shards), *FROZEN, f"runs={folder}/runs", "name=one"])
    return folder / "runs/one"


@pytest.fixture
def model(trained: Path) -> VideoTextModel:
    return emcl.load(trained, device="cpu")


@pytest.fixture
def videos(sample_shards: Path, tmp_path: Path) -> Path:
    assert main(["unpack", f"{sample_shards}/test-000000.tar", "--out", str(tmp_path / "videos")]) == 0
    return tmp_path / "videos"


def scored(run: Path) -> dict[str, Any]:
    return json.loads((run / "scores-test.json").read_text())["tasks"]["retrieval"]


# --- the scores of a run


def test_a_run_keeps_its_factors_and_gives_figures_with_and_without(trained: Path) -> None:
    factors = SharedFactors.load(trained / "best" / FACTORS)
    assert (factors.facts["videos"], factors.facts["texts"]) == (24, 96)
    assert factors.facts["sets"][0].endswith("train-*.tar") and weight_of(factors, "retrieval") == 1
    metrics, protocol = scored(trained)["metrics"], scored(trained)["protocol"]
    assert "shared factors (K 32, of 24 videos and 96 texts, weight 1), and without them besides" in protocol
    kept = Embeddings.open(RunFolder(trained).kept(EMBEDDINGS, "test"))
    similarity = load_file(RunFolder(trained).kept(SIMILARITY, "test"))["similarity"].numpy()
    assert kept.text_factors is not None and kept.video_factors is not None
    scale = emcl.load(trained, device="cpu").model.heads["retrieval"].log_odds_scale
    without = similarity - (kept.text_factors @ kept.video_factors.T).numpy() / scale
    for scores, suffix in ((similarity, ""), (without, "_without_factors_inductive")):
        for way, values in retrieval_metrics(scores, kept.owner).items():
            for name, value in values.items():
                assert metrics[f"{way}{suffix}/{name}"] == pytest.approx(value), (way, name, suffix)
    assert np.abs(without).max() <= 1 + 1e-5 and np.abs(without - similarity).max() > 0.01  # those are cosines
    (result,) = open_results(trained)
    from emcl.registry import task_class

    (variant,) = task_class("retrieval").report.variants(result)
    assert (variant.name, variant.note) == ("without factors", "inductive")


def test_a_setting_turns_them_off_and_an_export_without_says_so(
    trained: Path, sample_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "one"))
    off = run(None, evaluate_path=copy, overrides=["emcl.factors=0"])["retrieval"]
    assert "factors" not in off.protocol and not any("factors" in name for name in off.metrics)
    plain = scored(trained)["metrics"]
    assert off.metrics["text_to_video/MnR"] == plain["text_to_video_without_factors_inductive/MnR"]
    assert capsys.readouterr().out.count("note:") == 0
    (copy / "best" / FACTORS).unlink()
    assert run(None, evaluate_path=copy)["retrieval"].metrics == off.metrics
    assert f"note: scored without shared factors: {copy}/best has none" in capsys.readouterr().out
    settings = [*small(sample_shards), *FROZEN, f"runs={tmp_path}/runs", "name=none", "emcl.factors=0"]
    run(["retrieval"], overrides=settings)
    assert not (tmp_path / "runs/none/best" / FACTORS).exists()


def test_towers_that_have_learnt_want_a_validation_split(
    sample_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*small(sample_shards), *FROZEN[1:], "model.frozen=[text]", f"runs={tmp_path}/runs", "name=learnt"]
    run(["retrieval"], overrides=settings)
    said = capsys.readouterr().out
    assert said.count("note: no shared factors: the towers have learnt, and no validation split says") == 1
    assert not (tmp_path / "runs/learnt/best" / FACTORS).exists() and "scored without" not in said


@pytest.mark.parametrize("change", ["another model", "torn", "other towers"])
def test_a_file_that_is_not_the_models_is_refused_by_name(trained: Path, tmp_path: Path, change: str) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "one"))
    path = copy / "best" / FACTORS
    factors = SharedFactors.load(path)
    if change == "torn":
        path.write_bytes(path.read_bytes()[:5000])
    elif change == "another model":
        (copy / "best/scores.json").write_text('{"step": 7}')
    else:
        other = SharedFactors(bases=4).fit(torch.randn(20, 32), torch.randn(20, 32))
        other.save(path, model=factors.facts["model"], towers="others'")
    wanted = "holds no shared factors" if change == "torn" else "is of another model: without it"
    for use in (lambda: emcl.load(copy), lambda: run(None, evaluate_path=copy)):
        with pytest.raises(UserError, match=f"{FACTORS} {wanted}"):
            use()
    assert emcl.load(copy, factors=False).factors is None


def test_a_run_that_goes_on_finds_them_anew_by_its_present_settings(
    trained: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its indexes want new vectors then, and encode nothing."""
    copy = Path(shutil.copytree(trained, tmp_path / "one"))
    index = VideoIndex(tmp_path / "index", emcl.load(copy, device="cpu"), windows=Windows())
    index.update(videos)
    before = [hit.score for hit in index.search("a red circle", top=12)]
    index.close()
    run(None, resume=str(copy), overrides=["emcl.factors=8"])
    assert "K 8, of 24 videos" in scored(copy)["protocol"]
    with pytest.raises(UserError, match="was made with other shared factors, or changes; run `emcl index` again"):
        VideoIndex(tmp_path / "index", emcl.load(copy, device="cpu")).search("a red circle")
    monkeypatch.setattr(VideoTextModel, "encode_video", None)  # it would be called in vain
    again = VideoIndex(tmp_path / "index", emcl.load(copy, device="cpu"), windows=Windows())
    again.update(videos)
    assert [hit.score for hit in again.search("a red circle", top=12)] != pytest.approx(before, abs=1e-3)
    run(None, resume=str(copy), overrides=["emcl.factors=0"])
    assert not (copy / "best" / FACTORS).exists() and "factors" not in scored(copy)["protocol"]


def test_towers_of_an_earlier_run_may_have_learnt_the_pairs(
    trained: Path, sample_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*small(sample_shards), *FROZEN, f"runs={tmp_path}/runs", "name=next", "data.test=null"]
    run(["retrieval"], overrides=settings, init=trained)
    run(None, resume=f"{tmp_path}/runs/next")  # which is not told of the earlier run again
    assert capsys.readouterr().out.count("note: no shared factors: the towers have learnt") == 2


def test_samples_without_a_caption_are_no_queries(sample_shards: Path, tmp_path: Path) -> None:
    """Also where a whole batch has none, on any number of ranks, and on one that has no sample."""
    clips = open_shards(f"{sample_shards}/test-000000.tar")
    rows = [clips.rows[number] for number in range(3)]
    samples = [
        (dataclasses.replace(row.sample, captions=[] if number else row.sample.captions), "mp4", clips.read(row))
        for number, row in enumerate(rows)
    ]
    write_shard(tmp_path / "few.tar", samples)
    (alone,) = run_on_ranks(_scored_few, 1, tmp_path / "1", sample_shards, tmp_path / "few.tar")
    assert alone["text_to_video/R@50"] == 100 and "text_to_video_without_factors_inductive/MnR" in alone
    assert run_on_ranks(_scored_few, 4, tmp_path / "4", sample_shards, tmp_path / "few.tar")[0] == alone


def _scored_few(ranks: Ranks, shards: Path, few: Path) -> dict[str, float]:
    model, config, training = model_and_split(shards, "evaluate.batch_size=1")
    factors = find_factors(model, training, None, config, ranks, CPU, learnt=False)
    split = open_split(str(few), tokenizer_of(config))
    return evaluate(model, split, config, ranks, CPU, name="few", factors=factors)["retrieval"].metrics


# --- how they are fitted


def model_and_split(shards: Path, *settings: str) -> tuple[VideoLanguageModel, Config, Any]:
    config = resolve(["retrieval"], overrides=[*small(shards), *FROZEN, "data.workers=0", *settings])
    torch.manual_seed(0)
    model = VideoLanguageModel(config).eval()
    return model, config, open_split(str(config.data.train), tokenizer_of(config))


def _fitted(ranks: Ranks, shards: Path, videos: int) -> tuple[dict[str, Any], torch.Tensor]:
    """What they are fitted on, and how they score."""
    model, config, split = model_and_split(shards, f"emcl.factor_videos={videos}", "evaluate.batch_size=3")
    factors = find_factors(model, split, None, config, ranks, CPU, learnt=False)
    rows = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    return factors.facts, factors.score(rows[0], rows[1])


@pytest.mark.parametrize("videos", [24, 19])
def test_ranks_find_what_one_process_finds(sample_shards: Path, videos: int, tmp_path: Path) -> None:
    ((facts, scores),) = run_on_ranks(_fitted, 1, tmp_path, sample_shards, videos)
    assert facts["videos"] == videos and scores.std() > 0.02
    of_ranks = run_on_ranks(_fitted, 3, tmp_path, sample_shards, videos)
    for facts_there, scores_there in of_ranks:
        assert facts_there == {**facts, "held_out": pytest.approx(facts["held_out"], rel=1e-4)}
        torch.testing.assert_close(scores_there, scores, atol=1e-3, rtol=1e-3)
        assert torch.equal(scores_there, of_ranks[0][1]), "not the same bits"


def test_they_are_fitted_to_what_the_towers_put_out_before_their_heads(sample_shards: Path) -> None:
    model, config, split = model_and_split(sample_shards)
    backbone = model.backbone
    backbone.image.head, backbone.text.head = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
    factors = fit_factors(model, split, config, ALONE, CPU)
    clips, videos, texts = Clips(split, config.data, training=False), [], []
    with torch.no_grad():
        for row in range(len(split)):
            loaded = clips[Draw(row, None, 0)]
            assert loaded.frames is not None
            videos.append(backbone.image.trunk(backbone.preprocess(torch.from_numpy(loaded.frames))).mean(0))
            texts.append(backbone.text.trunk(backbone.tokenize(loaded.sample.captions)))
    torch.testing.assert_close(factors.video_mean, torch.stack(videos).double().mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(factors.text_mean, torch.cat(texts).double().mean(0), atol=1e-5, rtol=1e-5)
    owner = [row for row in range(len(split)) for _ in split.sample(row).captions]
    group = [number_of(split.sample(row), row) for row in range(len(split))]
    same = SharedFactors(bases=128).fit(torch.stack(videos), torch.cat(texts), owner, group=group)
    queries = torch.randn(20, 32), torch.randn(30, 32)
    torch.testing.assert_close(factors.score(*queries), same.score(*queries), atol=1e-3, rtol=1e-3)


def test_pairs_that_share_nothing_or_are_too_few_are_no_factors() -> None:
    torch.manual_seed(0)
    refused = 0
    for _ in range(20):
        noise = SharedFactors(bases=8).fit(torch.randn(50, 12), torch.randn(50, 12))
        assert noise.facts["held_out"] < 0.2
        if noise.facts["held_out"] <= 0:
            refused += 1
            with pytest.raises(UserError, match="what 50 videos and their captions share does not hold for others"):
                check_fit(noise)
    assert refused > 0
    with pytest.raises(UserError, match="too few videos with captions to find what they share"):
        check_fit(SharedFactors(bases=8).fit(torch.randn(1, 12), torch.randn(1, 12)))
    rows = torch.randn(300, 12)
    check_fit(SharedFactors(bases=8).fit(rows, rows + 0.1 * torch.randn(300, 12)))


def test_the_weight_is_that_of_the_best_mean_recall_on_the_validation_split(sample_shards: Path) -> None:
    model, config, split = model_and_split(sample_shards)
    factors = fit_factors(model, split, config, ALONE, CPU)
    factors.facts[FACTOR_WEIGHTS] = {"retrieval": 1.0}
    scorer: Any = collect(model, split, config, ALONE, CPU, name="x", only=["retrieval"], factors=factors)["retrieval"]
    scores_QG, kept, _ = scorer.gather()
    scale = model.heads["retrieval"].log_odds_scale
    ratio_QG = (kept.text_factors @ kept.video_factors.T).numpy() / scale
    recalls = {weight: choice_recall(scores_QG + weight * ratio_QG, kept.owner).mean for weight in GRID}
    best = max(recalls.values())
    chosen = scorer.factor_weight(GRID)
    assert chosen == min(weight for weight in GRID if recalls[weight] == best) > 0
    assert recalls[0.0] < best, recalls  # else nothing was to be chosen
    assert scorer.factor_weight([1e-9, 0.0]) == 0  # as good, and without


def test_factors_that_help_nothing_on_the_validation_split_are_left_out(
    sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emcl.tasks.retrieval_scorer import RetrievalScorer

    model, config, split = model_and_split(sample_shards, f"data.val={sample_shards}/val-000000.tar")
    val = open_split(str(config.data.val), tokenizer_of(config))
    monkeypatch.setattr(RetrievalScorer, "factor_weight", lambda self, weights: weights[2])
    assert find_factors(model, split, val, config, ALONE, CPU, learnt=True).facts[FACTOR_WEIGHTS] == {
        "retrieval": GRID[2]
    }
    monkeypatch.setattr(RetrievalScorer, "factor_weight", lambda self, weights: 0.0)
    with pytest.raises(UserError, match="they find no more on the validation split"):
        find_factors(model, split, val, config, ALONE, CPU, learnt=True)


# --- people's own use


def test_a_search_scores_as_the_evaluation_did(trained: Path, videos: Path, tmp_path: Path) -> None:
    index = VideoIndex(tmp_path / "index", emcl.load(trained, device="cpu"), windows=Windows())
    index.update(videos)
    kept = Embeddings.open(RunFolder(trained).kept(EMBEDDINGS, "test"))
    similarity = load_file(RunFolder(trained).kept(SIMILARITY, "test"))["similarity"]
    column = {f"{identity}.mp4": number for number, identity in enumerate(kept.videos)}
    for hits, scores in zip(index.search_all(kept.sentences, top=12), similarity, strict=True):
        assert len({hit.path for hit in hits}) == 12
        found = torch.tensor([hit.score for hit in hits])
        torch.testing.assert_close(found, scores[[column[hit.path] for hit in hits]], atol=1e-5, rtol=0)
        assert bool((found[:-1] >= found[1:]).all())


def test_the_first_stage_finds_by_the_factors_too(
    trained: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One candidate is ranked again: it has to be the best of all. Frames count alike here, as in the vectors."""
    monkeypatch.setattr("emcl.search.index.CANDIDATES", 1)
    model = emcl.load(trained, device="cpu")
    task: Any = model.model.heads["retrieval"]
    task.emcl, task.settings = None, dataclasses.replace(task.settings, pooling_temperature=1e9)
    index = VideoIndex(tmp_path / "index", model, windows=Windows())
    index.update(videos)
    queries = ["a red circle moves left", "a green square", "two objects", "a star jumps", "a small blue triangle"]
    files = sorted(videos.glob("*.mp4"))
    features = model.encode_video([str(file) for file in files])
    best = model.similarity(queries, features).max(1)
    plain = emcl.load(trained, device="cpu", factors=False)
    assert not torch.equal(best.indices, plain.similarity(queries, features).max(1).indices)
    for query, row, score in zip(queries, best.indices.tolist(), best.values.tolist(), strict=True):
        (hit,) = index.search(query, top=1)
        assert (hit.path, hit.score) == (files[row].name, pytest.approx(score, abs=1e-4))
    (same,) = index.search_by_video(files[3], top=1)
    assert (same.path, same.score) == (files[3].name, pytest.approx(1, abs=1e-5))


def test_embeddings_alone_are_refused_where_factors_count(model: VideoTextModel, trained: Path, videos: Path) -> None:
    features = model.encode_video([str(file) for file in sorted(videos.glob("*.mp4"))[:3]])
    queries = ["a red circle", "a star"]
    whole = model.similarity(queries, features)
    torch.testing.assert_close(model.similarity(model.encode_queries(queries), features), whole)
    for text, video in (
        (model.encode_text(queries), features),
        (queries, VideoFeatures(features.frames, features.mask)),
    ):
        with pytest.raises(UserError, match="lack what shared factors compare"):
            model.similarity(text, video)
    plain = emcl.load(trained, device="cpu", factors=False)
    alone = plain.similarity(plain.encode_text(queries), VideoFeatures(features.frames, features.mask))
    torch.testing.assert_close(alone, plain.similarity(queries, features))
    assert (alone - whole).abs().max() > 1e-3


def test_an_index_says_by_which_factors_it_was_made(
    trained: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name, *more in (("with",), ("without", "--no-factors")):
        assert main(["index", str(videos), "--model", str(trained), "--out", str(tmp_path / name), *more]) == 0
    assert capsys.readouterr().out.count("searched with shared factors (K 32, of 24 videos and 96 texts)") == 1
    found = {}
    for name in ("with", "without"):
        index = VideoIndex(tmp_path / name, emcl.load(trained, device="cpu"))
        found[name] = [hit.score for hit in index.search("a red circle", top=12)]
        index.close()
    files = [str(file) for file in sorted(videos.glob("*.mp4"))]
    plain = emcl.load(trained, device="cpu", factors=False).similarity("a red circle", files)[0]
    assert found["without"] == pytest.approx(plain.sort(descending=True).values.tolist(), abs=1e-5) != found["with"]
    with pytest.raises(UserError, match="was made with other shared factors, or changes; run `emcl index` again"):
        VideoIndex(tmp_path / "with", emcl.load(trained, device="cpu", factors=False)).search("a red circle")


def test_torn_factors_of_an_index_are_refused_in_one_line(model: VideoTextModel, videos: Path, tmp_path: Path) -> None:
    VideoIndex(tmp_path / "index", model, windows=Windows()).update(videos)
    (tmp_path / "index" / FACTORS).write_bytes(b"PK\3\4 torn")
    with pytest.raises(
        UserError, match="factors.npz holds no shared factors .*: delete the file, and run `emcl index`"
    ):
        VideoIndex(tmp_path / "index", model)
    (tmp_path / "index" / FACTORS).unlink()
    assert len(VideoIndex(tmp_path / "index", model).search("a red circle", top=12)) == 12


def test_an_index_of_an_older_version_is_refused_by_name(model: VideoTextModel, videos: Path, tmp_path: Path) -> None:
    import sqlite3

    index = VideoIndex(tmp_path / "index", model, windows=Windows())
    index.update(videos)
    index.close()
    with sqlite3.connect(tmp_path / "index/clips.sqlite") as base:
        base.execute("UPDATE facts SET value = '2' WHERE name = 'format'")
    base.close()
    with pytest.raises(UserError, match=r"index was made by another version \(format 2, not 3\): make it anew"):
        VideoIndex(tmp_path / "index", model)


def test_opening_an_index_leaves_the_model_as_it_was(model: VideoTextModel, videos: Path, tmp_path: Path) -> None:
    first = VideoIndex(tmp_path / "first", model, windows=Windows())
    first.update(videos)
    before = [hit.score for hit in first.search("a red circle", top=12)]
    own, model.factors = model.factors, None
    VideoIndex(tmp_path / "none", model, windows=Windows()).update(videos)
    model.factors = own
    none = VideoIndex(tmp_path / "none", model)  # which is searched without
    assert none.model.factors is None and model.factors is own
    assert [hit.score for hit in first.search("a red circle", top=12)] == before
    assert [hit.score for hit in none.search("a red circle", top=12)] != before


def test_an_index_that_is_open_takes_factors_that_are_fitted_meanwhile(
    sample_shards: Path, tmp_path: Path, model: VideoTextModel
) -> None:
    """As a server has it open while `emcl index --emcl PAIRS.csv` writes to it."""
    assert main(["unpack", f"{sample_shards}/train-*.tar", "--out", str(tmp_path / "videos")]) == 0
    VideoIndex(tmp_path / "index", model, windows=Windows()).update(tmp_path / "videos")
    opened = VideoIndex(tmp_path / "index", model)
    before = [hit.score for hit in opened.search("a red circle", top=24)]
    VideoIndex(tmp_path / "index", model, windows=Windows()).fit_pairs(
        read_table(tmp_path / "videos/captions.csv"), tmp_path / "videos"
    )
    after = [hit.score for hit in opened.search("a red circle", top=24)]
    assert after != pytest.approx(before, abs=1e-3)
    fresh = VideoIndex(tmp_path / "index", emcl.load(model.files[0].parent, device="cpu", factors=False))
    assert [hit.score for hit in fresh.search("a red circle", top=24)] == pytest.approx(after, abs=1e-6)
    file = sorted((tmp_path / "videos").glob("*.mp4"))[5]
    assert opened.search_by_video(file, top=1)[0].path == file.name


def test_parts_of_one_file_are_the_mean_of_their_windows_and_one_group(
    model: VideoTextModel, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = VideoIndex(tmp_path / "index", model, windows=Windows(1.0, 0.5, "windows"))
    index.update(videos)
    first, second, third = (path.name for path in sorted(videos.glob("*.mp4"))[:3])
    fitted: dict[str, Any] = {}
    monkeypatch.setattr(
        VideoTextModel, "fit_factors", lambda self, features, texts, owner, group: fitted.update(
            outputs=features.outputs, texts=texts, owner=owner, group=group
        )
    )  # fmt: skip
    pairs = [
        Clip(first, "a", "train", ["one", "two"], start=0.0, end=0.4),
        Clip(second, "b", "train", ["three"]),
        Clip(third, "c", "train"),  # no caption
        Clip(first, "d", "train", ["four"], start=0.7),
    ]
    index.fit_pairs(pairs, videos)
    assert (fitted["texts"], fitted["owner"]) == (["one", "two", "three", "four"], [0, 0, 1, 2])
    assert fitted["group"][0] == fitted["group"][2] != fitted["group"][1]
    for row, (name, start, end) in enumerate([(first, 0.0, 0.4), (second, 0.0, 99.0), (first, 0.7, 99.0)]):
        number = next(hit.window for hit in index.search("x", top=99) if hit.path == name)
        touched = [one.number for one in index.neighbours(number) if one.start < end and one.end > start]
        wanted = index.features(touched).outputs
        assert wanted is not None
        torch.testing.assert_close(fitted["outputs"][row], wanted.mean(0))


def test_an_index_serves_every_task_that_compares(sample_shards: Path, videos: Path, tmp_path: Path) -> None:
    """Its vectors hold the factors, whichever task will count them."""
    short = [*small(sample_shards), *FROZEN, f"runs={tmp_path}/runs", "name=two", "data.test=null"]
    run(["retrieval", "sharp"], overrides=[*short, "kinds.sharp=retrieval", "tasks.sharp.pooling_temperature=0.1"])
    path = tmp_path / "runs/two/best" / FACTORS
    factors = SharedFactors.load(path)
    assert factors.facts[FACTOR_WEIGHTS] == {"retrieval": 1.0, "sharp": 1.0}
    factors.facts[FACTOR_WEIGHTS] = {"retrieval": 0.25, "sharp": 0.0}
    path.unlink()
    kept = {name: factors.facts.pop(name) for name in ("sets", "model", "towers")}
    factors.save(path, **kept)
    run_folder = tmp_path / "runs/two"
    VideoIndex(tmp_path / "index", emcl.load(run_folder, device="cpu"), windows=Windows()).update(videos)
    files = [str(file) for file in sorted(videos.glob("*.mp4"))]
    for task in ("retrieval", "sharp"):
        loaded = emcl.load(run_folder, device="cpu", task=task)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("emcl.search.index.CANDIDATES", 11)  # one less than there are
            hits = VideoIndex(tmp_path / "index", loaded).search("a red circle", top=3)
        scores = dict(zip(files, loaded.similarity("a red circle", files)[0].tolist(), strict=True))
        assert [hit.score for hit in hits] == pytest.approx([scores[f"{videos}/{hit.path}"] for hit in hits], abs=1e-5)
        plain = emcl.load(run_folder, device="cpu", task=task, factors=False).similarity("a red circle", files)
        ratio = factors.score(loaded.encode_queries("a red circle").outputs, loaded.encode_video(files).outputs)
        weight = 0.25 / loaded.model.heads[task].log_odds_scale if task == "retrieval" else 0.0
        whole = loaded.similarity("a red circle", files)
        torch.testing.assert_close(whole, plain + weight * ratio, atol=1e-5, rtol=0)


def clip_of(folder: Path) -> Path:
    import open_clip

    from conftest import TINY

    torch.manual_seed(0)
    clip = open_clip.model.CLIP(**json.loads(Path(TINY).read_text())).eval()
    torch.save(clip.state_dict(), folder / "clip.pt")
    return folder / "clip.pt"


def test_factors_of_peoples_own_pairs(
    sample_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`captions.csv` of `emcl unpack` is such a table; a model that has learnt nothing, a plain CLIP, takes it."""
    from conftest import TINY

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    videos = tmp_path / "videos"
    assert main(["unpack", f"{sample_shards}/train-*.tar", "--out", str(videos)]) == 0
    weights, table, out = clip_of(tmp_path), videos / "captions.csv", tmp_path / "index"
    command = ["index", str(videos), "--model", TINY, "--pretrained", str(weights), "--out", str(out)]
    assert main([*command, "--cut", "windows"]) == 0
    plain = VideoIndex(out, emcl.load(TINY, pretrained=weights, device="cpu"))
    before = [hit.score for hit in plain.search("a red circle", top=24)]
    plain.close()
    assert main([*command, "--cut", "windows", "--emcl", str(table)]) == 0
    assert "24 as they were" in (said := capsys.readouterr().out) and "of 24 videos and 96 texts)" in said
    model = emcl.load(TINY, pretrained=weights, device="cpu")
    hits = VideoIndex(out, model).search("a red circle", top=24)
    features = model.encode_video([str(videos / hit.path) for hit in hits])
    clips = read_table(table)
    fitted = emcl.load(TINY, pretrained=weights, device="cpu")
    of_clips = fitted.encode_video([str(videos / clip.file) for clip in clips])
    captions = [caption for clip in clips for caption in clip.captions]
    owner = [row for row, clip in enumerate(clips) for _ in clip.captions]
    scores = fitted.fit_factors(of_clips, captions, owner).similarity("a red circle", features)[0]
    assert [hit.score for hit in hits] == pytest.approx(scores.tolist(), abs=1e-5) != pytest.approx(before, abs=1e-3)
    assert fitted.factors is not None and weight_of(fitted.factors, "retrieval") == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "pairs.csv",
            "file,caption\nnowhere.mp4,a dog\n",
            "has no nowhere.mp4, which the pairs name (1 of 1 are missing)",
        ),
        ("pairs.csv", "video,caption\na,b\n", "the header must name `file` and `caption`"),
        ("pairs.csv", "file,caption\n{first},a dog\n", "too few videos with captions to find what they share"),
        ("pairs.txt", "\n\n", "pairs.txt holds no sentence"),
        ("pairs.xlsx", "x", "pairs.xlsx: give pairs (.csv, .json, .jsonl) or sentences (.txt)"),
        ("none.csv", None, "none.csv: no such annotation file"),
    ],
)
def test_pairs_that_are_none_are_refused_in_one_line(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, said: str
) -> None:
    from conftest import TINY

    given = tmp_path / name
    if content is not None:
        given.write_text(content.format(first=min(path.name for path in videos.glob("*.mp4"))))
    command = ["index", str(videos), "--model", TINY, "--pretrained", str(clip_of(tmp_path)), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "index"), "--cut", "windows", "--emcl", str(given)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_every_option_is_shown_without_factors_and_with_them(trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "one"))
    options = {(one.emcl, one.rescoring): one for one in every_option(copy, bank_videos=10)}
    assert len(options) == 2 * 12  # those of EMCL by 3 rescorings
    metrics = scored(trained)["metrics"]
    for name, suffix in (
        ("its own (compact)", "_without_factors_inductive"),
        ("its own (compact) + shared factors", ""),
    ):
        found = options[name, "none"].metrics["text_to_video"]
        assert found["MnR"] == pytest.approx(metrics[f"text_to_video{suffix}/MnR"])
    bank = Embeddings.open(RunFolder(copy).kept(EMBEDDINGS, "bank"))
    own = open_factors(copy / "best", open_export(copy / "best")[0].backbone)
    assert bank.factors == fingerprint_of(own) != NO_FACTORS
    encoded = (copy / "embeddings-bank.safetensors").stat().st_mtime_ns
    every_option(copy, bank_videos=10)
    assert (copy / "embeddings-bank.safetensors").stat().st_mtime_ns == encoded
    (copy / "best" / FACTORS).unlink()  # the kept embeddings are of factors that there are no more
    assert len(every_option(copy, bank_videos=10)) == 12
    assert (copy / "embeddings-bank.safetensors").stat().st_mtime_ns != encoded
