"""An index of a folder of real files: what is encoded when, what a search finds, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import emcl
from conftest import TINY, shared, short_run, write_clips
from emcl.cli import main
from emcl.data.decode import duration
from emcl.data.samples import Sample
from emcl.data.shards import open_shards
from emcl.devices import Devices
from emcl.errors import UserError
from emcl.given_videos import Span, frames_of_given
from emcl.inference import VideoTextModel
from emcl.model.emcl_layer import INFERENCE_MODULE
from emcl.prepare.table import read_table
from emcl.prepare.writer import encode_mp4, write_shard
from emcl.run_folder import SIMILARITY, RunFolder
from emcl.search.index import VideoIndex
from emcl.search.windows import Windows, scenes

pytestmark = pytest.mark.xdist_group("search")


@pytest.fixture(scope="module")
def trained(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_run(sample_shards, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def videos(sample_shards: Path, tmp_path: Path) -> Path:
    """Twelve clips as files, two of them in a folder below."""
    folder = tmp_path / "videos"
    write_clips(sample_shards, folder)
    (folder / "below").mkdir()
    for path in sorted(folder.glob("*.mp4"))[:2]:
        path.rename(folder / "below" / path.name)
    return folder


@pytest.fixture
def model(trained: Path) -> VideoTextModel:
    return emcl.load(trained, device="cpu")


def test_a_search_ranks_as_the_model_does(model: VideoTextModel, videos: Path, tmp_path: Path) -> None:
    index = VideoIndex(tmp_path / "index", model, windows=Windows())
    changes = index.update(videos)
    assert (changes.added, len(index)) == (12, 12)
    files = sorted(videos.rglob("*.mp4"))
    for query in ("a red circle moves left", "a green square"):
        hits = index.search(query, top=12)
        scores = model.similarity(query, [str(path) for path in files])[0]
        expected = [str(files[number].relative_to(videos)) for number in scores.argsort(descending=True).tolist()]
        assert [hit.path for hit in hits] == expected
        torch.testing.assert_close(torch.tensor([hit.score for hit in hits]), scores.sort(descending=True).values)
    assert index.search_by_video(files[3])[0].path == str(files[3].relative_to(videos))


def test_a_search_for_all_sentences_ranks_as_the_evaluation_did(sample_shards: Path, tmp_path: Path) -> None:
    """To the last clip, and with the published EMCL, whose scores depend on what shares a tile."""
    test = f"data.test={sample_shards}/test-000000.tar"
    run = short_run(sample_shards, tmp_path, "emcl.variant=reference", "evaluate.tile=5", test)
    clips = open_shards(f"{sample_shards}/test-000000.tar")
    write_clips(sample_shards, tmp_path / "videos")
    index = VideoIndex(tmp_path / "index", emcl.load(run, device="cpu"), windows=Windows())
    index.update(tmp_path / "videos")
    sentences = [caption for row in clips.rows for caption in row.sample.captions]
    scores = load_file(RunFolder(run).kept(SIMILARITY, "test"))["similarity"]
    assert scores.shape == (len(sentences), 12)
    for hits, row in zip(index.search_all(sentences, top=12), scores, strict=True):
        best = row.sort(descending=True)
        assert [hit.path for hit in hits] == [f"{clips.rows[column].sample.id}.mp4" for column in best.indices.tolist()]
        torch.testing.assert_close(torch.tensor([hit.score for hit in hits]), best.values, atol=1e-5, rtol=0)


def test_only_what_changed_is_encoded_and_what_went_is_forgotten(
    model: VideoTextModel, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = VideoIndex(tmp_path / "index", model, windows=Windows())
    index.update(videos)
    encoded: list[str] = []
    encode = VideoTextModel.encode_video

    def noted(self: VideoTextModel, spans: list[Any], **how: Any) -> Any:
        encoded.append(str(spans[0].path))
        return encode(self, spans, **how)

    monkeypatch.setattr(VideoTextModel, "encode_video", noted)
    first, second, third, *_ = sorted(videos.glob("*.mp4"))
    first.unlink()
    shutil.copy(third, second)
    shutil.copy(third, videos / "new.mp4")
    (videos / "torn.mp4").write_bytes(third.read_bytes()[:200])
    changes = index.update(videos)
    assert sorted(encoded) == [str(videos / "new.mp4"), str(second)]
    assert (changes.added, changes.removed, list(changes.broken)) == (2, 1, ["torn.mp4"])
    paths = {hit.path for hit in index.search("a circle", top=50)}
    assert len(paths) == 12 and first.name not in paths and "new.mp4" in paths


def test_a_killed_update_goes_on_where_it_was(
    model: VideoTextModel, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, left = VideoTextModel.encode_video, [5]

    def dies(self: VideoTextModel, spans: list[Any], **how: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return encode(self, spans, **how)

    monkeypatch.setattr(VideoTextModel, "encode_video", dies)
    index = VideoIndex(tmp_path / "index", model, windows=Windows())
    with pytest.raises(KeyboardInterrupt):
        index.update(videos)
    index.close()
    left[0] = 100
    again = VideoIndex(tmp_path / "index", model, windows=Windows())
    changes = again.update(videos)
    assert (changes.kept, changes.added) == (5, 7)
    assert len({hit.path for hit in again.search("a circle", top=50)}) == 12


def test_an_update_killed_before_its_vectors_are_written_writes_them_the_next_time(
    model: VideoTextModel, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = VideoIndex(tmp_path / "index", model, windows=Windows())
    index.update(videos)
    first = min(videos.glob("*.mp4"))
    shutil.copy(first, videos / "new.mp4")

    def dies(self: VideoIndex) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(VideoIndex, "_write_vectors", dies)
        with pytest.raises(KeyboardInterrupt):
            index.update(videos)
    index.close()
    again = VideoIndex(tmp_path / "index", model, windows=Windows())
    assert again.update(videos).added == 0  # the file itself is there already
    assert {hit.path for hit in again.search_by_video(first, top=2)} == {first.name, "new.mp4"}
    assert again.update(videos).kept == 13 and not again._fact("vectors")


def test_a_moment_of_a_long_video_is_found_with_its_time(model: VideoTextModel, tmp_path: Path) -> None:
    assert Windows(10, 5).of(14.0) == [(0.0, 14.0)]
    assert Windows(10, 5).of(30.0) == [(0, 10), (5, 15), (10, 20), (15, 25), (20, 30)]
    assert [span[1] for span in Windows(4, 2).of(41.3)][-1] == 41.3
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    black = np.zeros((160, 64, 64, 3), np.uint8)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "long.mp4").write_bytes(encode_mp4(np.concatenate([black, noise, black]), 10))  # 16 to 20 s
    (tmp_path / "noise.mp4").write_bytes(encode_mp4(noise, 10))
    index = VideoIndex(tmp_path / "index", model, windows=Windows(4, 2, "windows"))
    index.update(tmp_path / "videos")
    (hit, *_) = index.search_by_video(tmp_path / "noise.mp4")
    assert (hit.start, hit.end) == (16.0, 20.0)


def test_a_video_is_cut_into_its_scenes(model: VideoTextModel, tmp_path: Path) -> None:
    """A real file of two scenes: the knife goes through tortillas until 6.2 s, then through a tomato."""
    file = shared("data/videos/j2Dhf-xFUxU_13_20.avi")

    def rounded(spans: list[tuple[float, float]]) -> list[tuple[float, ...]]:
        return [tuple(round(time, 1) for time in span) for span in spans]

    assert rounded(scenes(file, duration(file))) == [(0.0, 6.2), (6.2, 7.1)]
    assert rounded(Windows().of_file(file)) == [(0.0, 6.2), (5.1, 7.1)]  # less than two seconds are too little to see
    assert [len(Windows(cut=cut).of_file(file)) for cut in ("scenes", "windows")] == [2, 1]
    assert len(Windows(4, 2).of_file(file)) == 3  # the first scene is more than one window
    (tmp_path / "videos").mkdir()
    shutil.copy(file, tmp_path / "videos")
    index = VideoIndex(tmp_path / "index", model, windows=Windows())
    index.update(tmp_path / "videos")
    tomato = model.encode_video(Span(file, *Windows().of_file(file)[1]))
    (hit, _) = index.search_by_features(tomato)
    assert (round(hit.start, 1), round(hit.end, 1)) == (5.1, 7.1)


def test_above_a_size_the_nearest_are_found_among_rounded_vectors(
    model: VideoTextModel, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emcl.search.vectors.EXACT", 5)
    monkeypatch.setattr("emcl.search.index.CANDIDATES", 6)
    index = VideoIndex(tmp_path / "index", model, windows=Windows())
    index.update(videos)
    assert index.search("a red circle", top=3)[0].score >= index.search("a red circle", top=3)[1].score
    for file in sorted(videos.rglob("*.mp4")):
        nearest = index.search_by_video(file, top=1)[0]
        assert nearest.path == str(file.relative_to(videos)) and nearest.score == pytest.approx(1, abs=1e-5)


def test_devices_share_the_work_and_precision_is_chosen(
    model: VideoTextModel, trained: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Any] = sorted(videos.rglob("*.mp4"))
    alone = model.encode_video(files)
    two = Devices([torch.device("cpu"), torch.device("cpu")], torch.float32)
    shared_out = VideoTextModel(model.model, model.config, model.files, devices=two, batch_size=2)
    assert len(shared_out.replicas) == 2
    features = shared_out.encode_video(files)
    torch.testing.assert_close(features.frames, alone.frames)  # in order
    assert torch.equal(features.mask, alone.mask)
    rough = emcl.load(trained, device="cpu", precision="bf16").encode_video(files).frames
    assert 0 < (rough - alone.frames).norm() / alone.frames.norm() < 0.02
    assert emcl.load(trained).devices.dtype == torch.float32
    with pytest.raises(UserError, match="precision 'int8' is none of fp32, bf16, fp16"):
        emcl.load(trained, precision="int8")
    with pytest.raises(UserError, match="fp16 wants a GPU"):
        emcl.load(trained, device="cpu", precision="fp16")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="there is no GPU here"):
            emcl.load(trained, device="cuda")


def test_another_models_index_is_refused(model: VideoTextModel, trained: Path, videos: Path, tmp_path: Path) -> None:
    index = VideoIndex(tmp_path / "index", model, windows=Windows())
    index.update(videos)
    other = tmp_path / "other"
    shutil.copytree(trained / "best", other)
    with (other / "config.yaml").open("a") as config:
        config.write("\n# of another run\n")
    with pytest.raises(UserError, match="made with another model"):
        VideoIndex(tmp_path / "index", emcl.load(other, device="cpu"))
    with pytest.raises(UserError, match="made with another length"):
        VideoIndex(tmp_path / "index", model, windows=Windows(3.0, 1.0))
    with pytest.raises(UserError, match="no index there"):
        VideoIndex(tmp_path / "nowhere", model)


def test_the_commands(
    trained: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    index, model = str(tmp_path / "index"), str(trained)
    file = str(next(iter(sorted(videos.glob("*.mp4")))))
    assert main(["index", str(videos), "--model", model, "--out", index]) == 0
    assert "12 windows; 12 files encoded" in capsys.readouterr().out
    assert main(["search", index, "a red circle", "--model", model, "--top", "3", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3 and set(lines[0]) == {"path", "start", "end", "score", "window"}
    assert main(["search", index, "--video", file, "--model", model, "--top", "1"]) == 0
    assert Path(file).name in capsys.readouterr().out
    assert main(["caption", file, "--model", model]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: ")
    assert main(["ask", file, "what colour is it?", "--model", model]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["search", index, "--model", model]) == 2
    assert "give a sentence" in capsys.readouterr().err


def test_a_plain_clip_ranks_by_the_mean_of_its_frames(videos: Path, tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    clip = open_clip.model.CLIP(**json.loads(Path(TINY).read_text())).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    model = emcl.load(TINY, pretrained=tmp_path / "clip.pt", device="cpu")
    files = [str(path) for path in sorted(videos.rglob("*.mp4"))]
    queries = ["a red circle", "a green square"]
    with torch.no_grad():
        text = torch.nn.functional.normalize(
            clip.encode_text(open_clip.get_tokenizer("ViT-B-32", context_length=32)(queries)), dim=-1
        )
        frames = [torch.from_numpy(frames_of_given(file, model.config.data)) for file in files]
        images = [clip.encode_image(model.model.backbone.preprocess(clip_frames)) for clip_frames in frames]
        means = torch.stack([torch.nn.functional.normalize(one, dim=-1).mean(0) for one in images])
    expected = text @ torch.nn.functional.normalize(means, dim=-1).T
    torch.testing.assert_close(model.similarity(queries, files), expected, atol=2e-3, rtol=0)
    index = VideoIndex(tmp_path / "index", model, windows=Windows())
    index.update(videos)
    best = Path(files[int(model.similarity(queries[0], files).argmax())])
    assert index.search(queries[0])[0].path == str(best.relative_to(videos))
    with pytest.raises(UserError, match="no such file"):
        emcl.load(TINY, pretrained=tmp_path / "nowhere.pt")


def test_emcl_is_fitted_to_a_collection_for_a_model_without_it(
    videos: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    torch.manual_seed(0)
    clip = open_clip.model.CLIP(**json.loads(Path(TINY).read_text())).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    plain = emcl.load(TINY, pretrained=tmp_path / "clip.pt", device="cpu")
    files: list[Any] = sorted(videos.rglob("*.mp4"))
    features, queries = plain.encode_video(files), plain.encode_text(["a red circle", "a green square"])
    index = VideoIndex(tmp_path / "index", plain, windows=Windows())
    index.update(videos, emcl=True)
    layer = emcl.EMCL(variant="compact", **{**INFERENCE_MODULE, "bases": 32}).fit(features.mean()).eval()
    # the layer is linear, so correcting a mean of frames is what correcting frames and taking their mean gives
    expected = torch.nn.functional.cosine_similarity(
        layer.transform(queries)[:, None], layer.transform(features.mean())[None], dim=-1
    )
    torch.testing.assert_close(index.model.similarity(queries, features), expected, atol=2e-3, rtol=0)
    again = emcl.load(TINY, pretrained=tmp_path / "clip.pt", device="cpu")
    hits = VideoIndex(tmp_path / "index", again).search("a red circle", top=12)  # it is kept with the index
    best = expected[0].sort(descending=True)
    assert [hit.score for hit in hits] == pytest.approx(best.values.tolist(), abs=2e-3)
    with pytest.raises(UserError, match="was trained with an EMCL layer of its own"):
        VideoIndex(tmp_path / "other", emcl.load(trained, device="cpu"), windows=Windows()).update(videos, emcl=True)


def test_shards_become_files_and_a_table_again(sample_shards: Path, tmp_path: Path) -> None:
    assert main(["unpack", f"{sample_shards}/test-000000.tar", "--out", str(tmp_path / "files")]) == 0
    clips = open_shards(f"{sample_shards}/test-000000.tar")
    for row in clips.rows:
        assert (tmp_path / "files" / f"{row.sample.id}.mp4").read_bytes() == clips.read(row)
    read = read_table(tmp_path / "files" / "captions.csv")
    assert [(clip.id, clip.captions) for clip in read] == [(row.sample.id, row.sample.captions) for row in clips.rows]
    sample = Sample(id="../../up", captions=["x"])
    write_shard(tmp_path / "bad.tar", [(sample, "mp4", clips.read(clips.rows[0]))])
    assert main(["unpack", str(tmp_path / "bad.tar"), "--out", str(tmp_path / "deep" / "er")]) == 0
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == [
        "%2E%2E%2F%2E%2E%2Fup.mp4",
        "captions.csv",
    ]
