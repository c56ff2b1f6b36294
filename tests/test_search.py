"""An index of a folder of real files: what is encoded when, what a search finds, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emcl
from conftest import TINY, short_run, write_clips
from emcl.cli import main
from emcl.errors import UserError
from emcl.inference import VideoTextModel
from emcl.prepare.writer import encode_mp4
from emcl.search.index import VideoIndex
from emcl.search.windows import Windows


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
        expected = [str(files[place].relative_to(videos)) for place in scores.argsort(descending=True).tolist()]
        assert [hit.path for hit in hits] == expected
        torch.testing.assert_close(torch.tensor([hit.score for hit in hits]), scores.sort(descending=True).values)
    assert index.search_by_video(files[3])[0].path == str(files[3].relative_to(videos))


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
    found = {hit.path for hit in index.search("a circle", top=50)}
    assert len(found) == 12 and first.name not in found and "new.mp4" in found


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
        frames = [torch.from_numpy(model._frames(file)) for file in files]
        images = [clip.encode_image(model.model.backbone.pixels(clip_frames)) for clip_frames in frames]
        means = torch.stack([torch.nn.functional.normalize(one, dim=-1).mean(0) for one in images])
    expected = text @ torch.nn.functional.normalize(means, dim=-1).T
    torch.testing.assert_close(model.similarity(queries, files), expected, atol=2e-3, rtol=0)
    index = VideoIndex(tmp_path / "index", model, windows=Windows())
    index.update(videos)
    best = Path(files[int(model.similarity(queries[0], files).argmax())])
    assert index.search(queries[0])[0].path == str(best.relative_to(videos))
    with pytest.raises(UserError, match="no such file"):
        emcl.load(TINY, pretrained=tmp_path / "nowhere.pt")
