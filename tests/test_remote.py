"""Shards by URL, served on 127.0.0.1: copied once, whole or not at all, whatever the server does."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import launch, shared, small
from emcl.cli import main
from emcl.data import remote
from emcl.data.shards import find_shards, open_shards
from emcl.errors import UserError
from emcl.prepare.sharding import Encoding, Options, prepare_shards
from emcl.prepare.table import read_table
from emcl.prepare.videos import Videos


class Server(http.server.ThreadingHTTPServer):
    """A folder's files; `trouble[name]` are what the next answers for a file are instead."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.trouble = folder, Counter[str](), dict[str, list[str]]()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked[name] += 1
        waiting = self.server.trouble.get(name) or ["fine"]
        what = waiting.pop(0)
        path = self.server.folder / name
        if what == "500" or not path.is_file():
            self.send_error(500 if what == "500" else 404)
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if what == "other":
            content = bytes(len(content))
        if what == "slow":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            time.sleep(3 * remote.SILENCE)
            return
        self.wfile.write(content[: len(content) // 2] if what == "cut" else content)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    for shard in sample_shards.glob("*.tar"):
        shutil.copy(shard, folder)
    monkeypatch.setenv("EMCL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PATIENCE", 0.01)
    monkeypatch.setattr(remote, "SILENCE", 1.0)
    running = Server(folder)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_brace_pattern_is_copied_once(server: Server, sample_shards: Path) -> None:
    pattern = f"{server.url}/train-{{000000..000001}}.tar"
    for _ in range(2):
        copies = find_shards(pattern)
        assert [path.name for path in copies] == ["train-000000.tar", "train-000001.tar"]
        assert [path.read_bytes() for path in copies] == [(sample_shards / path.name).read_bytes() for path in copies]
    assert server.asked["train-000000.tar"] == 1
    assert len(open_shards(pattern)) == 24


@pytest.mark.parametrize("trouble", ["500", "cut", "slow"])
def test_a_server_in_trouble_is_asked_again(trouble: str, server: Server, sample_shards: Path) -> None:
    server.trouble["val-000000.tar"] = [trouble] * 3
    (path,) = find_shards(f"{server.url}/val-000000.tar")
    assert path.read_bytes() == (sample_shards / "val-000000.tar").read_bytes()
    assert server.asked["val-000000.tar"] == 4


@pytest.mark.parametrize("trouble", ["500", "cut", "slow"])
def test_one_that_stays_in_trouble_is_named_and_leaves_nothing(trouble: str, server: Server) -> None:
    server.trouble["val-000000.tar"] = [trouble] * 99
    url = f"{server.url}/val-000000.tar"
    with pytest.raises(UserError, match=rf"{url}: not to be had in {remote.TRIES} tries"):
        find_shards(url)
    assert [path.name for path in remote.cache_folder(url).iterdir()] == [".val-000000.tar.lock"]


def test_a_shard_that_is_not_there(server: Server) -> None:
    with pytest.raises(UserError, match=r"gone\.tar: not there"):
        find_shards(f"{server.url}/gone.tar")
    assert server.asked["gone.tar"] == 1


def test_a_glob_goes_by_the_index_and_checksums_are_checked(
    server: Server, sample_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "videos").mkdir()
    shards = open_shards(f"{sample_shards}/val-000000.tar")
    lines = ["file,caption"]
    for row in shards.rows[:4]:
        (tmp_path / "videos" / f"{row.sample.id}.mp4").write_bytes(shards.read(row))
        lines.append(f"{row.sample.id}.mp4,{row.sample.captions[0]}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    server.folder = tmp_path / "prepared"
    options = Options(encoding=Encoding(keep=True), shard_size=2, processes=1, progress=False)
    prepare_shards(read_table(tmp_path / "table.csv"), Videos(tmp_path / "videos"), server.folder, options, source="x")
    server.trouble["train-000001.tar"] = ["other"]  # of the right length
    assert len(open_shards(f"{server.url}/train-*.tar")) == 4
    assert server.asked["train-000001.tar"] == 2
    with pytest.raises(UserError, match="no such shard"):
        find_shards(f"{server.url}/test-*.tar")
    (server.folder / "index.json").write_text(json.dumps({"other": 1}))
    with pytest.raises(UserError, match="not the index"):
        find_shards(f"{server.url}/train-*.tar")


@pytest.mark.parametrize("pattern", ["pipe:touch ran", "ssh://host/x.tar", "memory://x.tar"])
def test_other_schemes_are_refused(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="shards are read from http"):
        find_shards(pattern)
    assert not list(tmp_path.iterdir())


def test_two_ranks_train_on_shards_by_url(server: Server, sample_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    settings = [*small(sample_shards), f"data.train={server.url}/train-{{000000..000001}}.tar", "optim.epochs=1"]
    done = launch("--task", "retrieval", *settings, cwd=run, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.asked["train-000001.tar"] == 1


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two prepared shards with their index."""
    clips = read_table(shared("data/videos") / "annotations.json")
    options = Options(encoding=Encoding(keep=True), shard_size=5, processes=1, progress=False)
    prepare_shards(clips, Videos(shared("data/videos")), tmp_path / "shards", options, source="folder")
    return tmp_path / "shards"


def test_shards_are_copied_to_a_store_once_and_read_from_there(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMCL_CACHE", str(tmp_path / "cache"))
    url = f"file://{tmp_path}/store/mine"
    count = len(list(shards.glob("*.tar")))
    assert remote.publish(shards, url) == count
    assert remote.publish(shards, url) == 0  # all there already
    victim = sorted((tmp_path / "store/mine").glob("*.tar"))[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    assert remote.publish(shards, url) == 1
    assert [path.read_bytes() for path in find_shards(f"{url}/*.tar")] == [
        path.read_bytes() for path in sorted(shards.glob("*.tar"))
    ]


def test_a_store_that_cannot_be_written_to_is_named_and_the_shards_are_kept(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not by http"):
        remote.publish(shards, "http://127.0.0.1/x")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=f"the shards are whole in {shards}"):
        remote.publish(shards, f"file://{tmp_path}/taken")


def test_prepare_writes_to_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMCL_CACHE", str(tmp_path / "cache"))
    videos = shared("data/videos")
    (tmp_path / "one.csv").write_text("file,caption\nmmaction_test.mp4,a pool is being cleaned\n")
    command = [
        "prepare", "folder", "--videos", str(videos), "--annotations", str(tmp_path / "one.csv"),
        "--out", f"file://{tmp_path}/store", "--staging", str(tmp_path / "staging"), "--keep",
    ]  # fmt: skip
    assert main(command) == 0
    assert len(open_shards(f"file://{tmp_path}/store/train-*.tar")) == 1
