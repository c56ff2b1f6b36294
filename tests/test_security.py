"""Payloads planted wherever something foreign is read: none is ever run. And secrets, which never leave."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from conftest import mlflow_run, recorded, small
from emcl.cli import main
from emcl.config import resolve
from emcl.data.decode import DecodeError, decode
from emcl.data.shards import find_shards, open_shards
from emcl.errors import UserError
from emcl.run_folder import saved_config
from emcl.secrets import masked
from emcl.train.run import run


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What would be there if a payload had run; and a payload does so when it is let."""
    probe = tmp_path / "probe"
    pickle.loads(pickle.dumps(Payload(probe)))
    assert probe.exists()
    return tmp_path / "executed"


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **changes: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


SAMPLE = json.dumps({"id": "a", "captions": ["x"]}).encode()


@pytest.mark.parametrize("ending", ["pkl", "pickle", "pyd", "pth", "pt", "npy", "cbor", "mp", "json.pkl"])
def test_a_pickle_under_any_name_of_a_shard(ending: str, mark: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.mp4", b"x")
        add(tar, "a.json", SAMPLE)
        add(tar, f"a.{ending}", pickle.dumps(Payload(mark)))
    assert len(open_shards(str(tmp_path / "a.tar"))) == 1
    assert not mark.exists()


@pytest.mark.parametrize(
    "pattern", ["pipe:touch {mark}", "pipe:cat x.tar", "ftp://host/a.tar", "ssh://host/a.tar", "gopher:a"]
)
def test_a_pattern_never_runs_a_command(pattern: str, mark: Path) -> None:
    with pytest.raises(UserError):
        find_shards(pattern.format(mark=mark))
    assert not mark.exists()


def test_members_that_would_leave_the_folder_or_point_elsewhere_are_only_names(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"secret")
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as tar:
        for name in ("../up", "/tmp/absolute", "a/../../b"):
            add(tar, f"{name}.mp4", b"video")
            add(tar, f"{name}.json", SAMPLE)
        add(tar, "link.mp4", type=tarfile.SYMTYPE, linkname=str(secret))
        add(tar, "hard.mp4", type=tarfile.LNKTYPE, linkname="../secret.mp4")
    before = sorted(tmp_path.rglob("*"))
    shards = open_shards(str(tmp_path / "in" / "a.tar"))
    assert [shards.read(row) for row in shards.rows] == [b"video"] * 3
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a.mp4", "a.json"])
def test_a_member_of_an_absurd_size_is_not_read_into_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.json" if name == "a.mp4" else "a.mp4", SAMPLE)
        add(tar, name, b"x")
    raw = bytearray(path.read_bytes())
    header = tarfile.TarInfo(name)
    header.size = 2**40
    at = raw.index(name.encode() + b"\0")
    raw[at : at + 512] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.tar"):
        open_shards(str(path))


def test_yaml_of_a_recipe_makes_no_objects(mark: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(f'seed: !!python/object/apply:os.system ["touch {mark}"]\n')
    with pytest.raises(UserError, match=r"evil\.yaml is not readable YAML"):
        resolve(["retrieval"], str(recipe))
    assert not mark.exists()


def test_foreign_weights_are_read_without_unpickling(
    mark: Path, sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload(mark)}, tmp_path / "evil.pt")
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    for name in ("evil.pt", "evil.safetensors"):
        with pytest.raises(UserError, match="evil"):
            run(["retrieval"], overrides=[*small(sample_shards), f"model.pretrained={tmp_path / name}"])
        assert not mark.exists()


def test_an_export_with_a_payload_for_a_configuration(
    mark: Path, sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.yaml").write_text(f'seed: !!python/object/apply:os.system ["touch {mark}"]\n')
    (export / "scores.json").write_text("{}")
    (export / "model.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UserError, match=r"config\.yaml"):
        run(["retrieval"], evaluate_path=export)
    assert not mark.exists()


def test_annotations_are_never_unpickled(mark: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for name in ("train_list.txt", "val_list.txt", "test_list.txt"):
        (tmp_path / "notes" / name).write_text("a\n")
    (tmp_path / "notes" / "raw-captions.pkl").write_bytes(pickle.dumps({"a": Payload(mark)}))
    (tmp_path / "videos").mkdir()
    arguments = ["prepare", "msvd", "--annotations", str(tmp_path / "notes"), "--videos", str(tmp_path / "videos")]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--allow-missing"]) != 0
    assert not mark.exists()


def test_secrets_are_masked() -> None:
    os.environ["MY_API_KEY"] = "hunter2hunter2"
    try:
        assert masked("say hunter2hunter2 twice: hunter2hunter2") == "say *** twice: ***"
        assert masked("s3://me:pass@host/a.tar") == "s3://***@host/a.tar"
        assert (
            masked("https://h/a?X-Amz-Signature=abc&part=3&token=t")
            == "https://h/a?X-Amz-Signature=***&part=3&token=***"
        )
        assert masked("https://host/train-{000000..000003}.tar") == "https://host/train-{000000..000003}.tar"
    finally:
        del os.environ["MY_API_KEY"]


def test_no_secret_reaches_mlflow_or_an_export(
    sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STORE_TOKEN", "topsecretvalue")
    (tmp_path / "topsecretvalue").symlink_to(sample_shards)
    settings = small(Path("${oc.env:STORE_TOKEN}"))
    mixture = "data.mixture={topsecretvalue/train-000000.tar: 1}"
    run(["retrieval"], overrides=[*settings, "optim.max_steps=1", "name=run", mixture, *recorded(tmp_path)])
    assert mlflow_run(tmp_path)[1].data.params["data.train"] == "***/train-*.tar"
    shown = capfd.readouterr()
    assert "topsecretvalue" not in shown.out + shown.err
    for path in [
        *(tmp_path / "mlartifacts").rglob("*"),
        *(tmp_path / "runs/run/best").iterdir(),
        tmp_path / "mlflow.db",
    ]:
        assert path.is_dir() or b"topsecretvalue" not in path.read_bytes(), path
    export = saved_config(tmp_path / "runs/run/best")  # which is still read as YAML
    assert (export.data.train, export.name) == ("***/train-*.tar", "run")
    assert list(export.data.mixture) == ["***/train-000000.tar"]


def test_a_playlist_in_place_of_a_video_opens_no_other_file(sample_shards: Path, tmp_path: Path) -> None:
    clips = open_shards(f"{sample_shards}/test-000000.tar")
    (tmp_path / "secret.mp4").write_bytes(clips.read(clips.rows[0]))
    lists = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n",
        "concat": "ffconcat version 1.0\nfile 'secret.mp4'\n",
    }
    for name, content in lists.items():
        planted = tmp_path / f"{name}.mp4"
        planted.write_text(content)
        if name == "concat":  # FFmpeg's own choice would be to follow it
            with av.open(str(planted)) as container:
                assert next(container.decode(video=0)).width
        for video in (planted, content.encode()):
            with pytest.raises(DecodeError):
                decode(video, frames=1, size=32)
