"""The server: what it answers, what it refuses, and what it does when there is too much to do."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch

import emcl
from conftest import ROOT, emcl_command, launch_environment, short_run, write_clips
from emcl.search.index import VideoIndex
from emcl.search.windows import Windows
from forked import start_program
from local_ranks import free_port

pytestmark = pytest.mark.xdist_group("serve")


class Server:
    """`emcl serve` in a process of its own."""

    def __init__(self, index: Path, run: Path, *options: str, env: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory()
        cwd = Path(self._folder.name)
        self.log = cwd / "log"
        self.log.touch()
        command = ["serve", str(index), "--model", str(run), "--port", str(self.port), *options]
        self.process = start_program("emcl.cli", *command, env=launch_environment(env), cwd=cwd, stdout=self.log)
        while f":{self.port}" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def __call__(
        self, path: str, body: bytes | None = None, method: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method or ("POST" if body is not None else "GET"), path, body, named)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, path: str, body: bytes | None = None, **headers: str) -> Any:
        status, _, content = self(path, body, **headers)
        assert status == 200, content
        return json.loads(content)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


@contextmanager
def serving(index: Path, run: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    server = Server(index, run, *options, env=env)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="module")
def trained(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_run(sample_shards, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def indexed(trained: Path, sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of twelve clips, beside their folder `videos` and a file that is not in it."""
    folder = tmp_path_factory.mktemp("indexed")
    write_clips(sample_shards, folder / "videos")
    (folder / "secret.mp4").write_bytes(b"secret")
    VideoIndex(folder / "index", emcl.load(trained, device="cpu"), windows=Windows()).update(folder / "videos")
    return folder / "index"


@pytest.fixture(scope="module")
def server(indexed: Path, trained: Path) -> Iterator[Server]:
    with serving(indexed, trained, "--max-upload", "1") as running:
        yield running


@pytest.fixture
def clip(indexed: Path) -> Path:
    return min((indexed.parent / "videos").glob("*.mp4"))


def test_the_api_says_what_the_model_says(server: Server, trained: Path, clip: Path) -> None:
    model = emcl.load(trained, device="cpu")
    sent = {"Content_Type": "video/mp4"}
    video = clip.read_bytes()
    query = "a red circle moves left"
    hits = server.json(f"/api/search?query={quote(query)}&top=12")["hits"]
    files = sorted(clip.parent.glob("*.mp4"))
    scores = model.similarity(query, [str(file) for file in files])[0]
    assert [hit["path"] for hit in hits] == [files[i].name for i in scores.argsort(descending=True).tolist()]
    torch.testing.assert_close(torch.tensor([hit["score"] for hit in hits]), scores.sort(descending=True).values)
    alike = server.json("/api/search/video?top=3", video, **sent)["hits"]
    assert alike[0]["path"] == clip.name and alike[0]["score"] == pytest.approx(1, abs=1e-4)
    assert server.json(f"/api/windows/{alike[0]['window']}/similar?top=1")["hits"][0]["path"] == clip.name
    features = model.encode_video(clip)
    body = json.dumps({"texts": [query, "x"]}).encode()
    rows = server.json("/api/embed/text", body, Content_Type="application/json")["embeddings"]
    torch.testing.assert_close(torch.tensor(rows), model.encode_text([query, "x"]), atol=1e-4, rtol=1e-4)
    rows = server.json("/api/embed/video", video, **sent)["embeddings"]
    torch.testing.assert_close(torch.tensor(rows), features.frames[0][features.mask[0]], atol=1e-4, rtol=1e-4)
    number = alike[0]["window"]
    caption = model.caption(clip)[0]
    assert server.json("/api/caption", video, **sent)["caption"] == caption
    assert server.json(f"/api/windows/{number}/caption")["caption"] == caption
    question = quote("what color is it?")
    answers = [
        server.json(f"/api/answer?question={question}", video, **sent)["answers"],
        server.json(f"/api/windows/{number}/answer?question={question}")["answers"],
    ]
    expected = model.answer(clip, "what color is it?", top=3)
    for items in answers:
        assert [(item["answer"], pytest.approx(item["probability"], abs=1e-4)) for item in items] == expected
    curve = server.json(f"/api/windows/{number}/curve?query={quote(query)}")
    cosine = torch.nn.functional.cosine_similarity(features.frames[0], model.encode_text(query), dim=-1)
    torch.testing.assert_close(torch.tensor(curve["similarity"]), cosine[features.mask[0]], atol=1e-4, rtol=0)
    assert curve["seconds"] == sorted(curve["seconds"])
    sent_curve = server.json(f"/api/curve?query={quote(query)}", video, **sent)
    assert sent_curve["seconds"] == pytest.approx(curve["seconds"])
    facts = server.json("/api/facts")
    assert facts["windows"] == 12 and set(facts["tasks"]) == {"retrieval", "captioning", "msrvtt_qa"}


def test_pictures_and_parts_of_videos_are_served(server: Server, clip: Path) -> None:
    hit = server.json("/api/search?query=circle&top=1")["hits"][0]
    status, headers, picture = server(hit["thumbnail"])
    assert (status, headers["content-type"]) == (200, "image/jpeg") and picture[:2] == b"\xff\xd8"
    whole = (clip.parent / hit["path"]).read_bytes()
    status, headers, content = server(hit["video"])
    assert (status, headers["content-type"], content) == (200, "video/mp4", whole)
    status, headers, content = server(hit["video"], Range="bytes=100-199")
    assert (status, content) == (206, whole[100:200])
    status, headers, content = server(f"/api/windows/{hit['window']}/excerpt.mp4")
    assert (status, headers["content-type"], content[4:8]) == (200, "video/mp4", b"ftyp")


def test_files_outside_the_index_are_never_served(server: Server, indexed: Path, clip: Path) -> None:
    for path in (
        "/../secret.mp4", "/%2e%2e/secret.mp4", "/..%2fsecret.mp4", "/....//secret.mp4", "/page/../../secret.mp4",
        f"/{indexed.parent}/secret.mp4", f"/%2f{indexed.parent}/secret.mp4", "/api/windows/..%2f..%2fsecret.mp4/video",
        "/api/windows/1/video/../../../secret.mp4", "/%5c..%5csecret.mp4", "/page.js%00.mp4", "/api.py", "/../api.py",
    ):  # fmt: skip
        status, _, content = server(path)
        assert status in (400, 404, 422) and b"secret" not in content, path
    hit = server.json("/api/search/video?top=1", clip.read_bytes(), Content_Type="video/mp4")["hits"][0]
    original = clip.read_bytes()
    clip.unlink()
    try:  # a file of the index that becomes a link out of its folder
        assert server(hit["video"])[0] == 404
        clip.symlink_to(indexed.parent / "secret.mp4")
        assert server(hit["video"])[0] == 404 and server(hit["thumbnail"] + "?fresh")[0] == 404
    finally:
        clip.unlink()
        clip.write_bytes(original)


@pytest.mark.parametrize(
    ("content", "kind", "status", "says"),
    [
        (b"x" * (2**20 + 1), "video/mp4", 413, "1 MiB"),
        (b"", "video/mp4", 400, "empty"),
        (b"<html>", "text/html", 415, "video/mp4"),
        (b"not a video at all", "video/mp4", 400, "does not decode"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "video/mp4", 400, "does not decode"),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "application/octet-stream", 400, "does not decode"),
    ],
    ids=["too large", "empty", "no video's type", "no video", "a playlist", "a list of files"],
)
def test_what_is_sent_is_checked(server: Server, content: bytes, kind: str, status: int, says: str) -> None:
    for path in ("/api/search/video", "/api/caption", "/api/answer?question=x", "/api/curve?query=x"):
        code, _, body = server(path, content, Content_Type=kind)
        assert code == status and says in json.loads(body)["detail"]
    temporary = Path(tempfile.gettempdir())
    kept, deadline = set(temporary.glob("emcl-upload-*")), time.monotonic() + 30
    while kept & set(temporary.glob("emcl-upload-*")) and time.monotonic() < deadline:
        time.sleep(0.1)  # another test's server may be at work
    assert not kept & set(temporary.glob("emcl-upload-*"))


def test_a_body_without_a_length_is_cut_off_at_the_limit(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    chunks = (b"x" * 65536 for _ in range(10_000))
    try:
        connection.request("POST", "/api/caption", chunks, {"Content-Type": "video/mp4"}, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server has hung up while there was more to send
    finally:
        connection.close()


def test_other_sites_and_names_are_kept_out(server: Server) -> None:
    status, _, _ = server("/api/facts", Host="videos.example.org")
    assert status == 400
    _, headers, _ = server("/")
    assert "default-src 'none'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in server("/api/facts", Origin="http://elsewhere.example")[1]


def test_health_and_figures(server: Server) -> None:
    assert server.json("/healthz") == {"status": "ok"}
    server.json("/api/search?query=circle")
    server("/api/windows/999999/video")
    status, headers, content = server("/metrics")
    text = content.decode()
    assert status == 200 and headers["content-type"].startswith("text/plain")
    assert re.search(r'emcl_requests_total\{route="/api/search",status="200"\} [1-9]', text)
    assert 'emcl_requests_total{route="/api/windows/{number}/video",status="404"}' in text
    assert "process_resident_memory_bytes" in text and "emcl_windows 12.0" in text
    named = [line.rpartition(" ")[0] for line in text.splitlines()]  # without the figures, which may be anything
    assert not any("999999" in name for name in named)  # a route, not a path: there would be no end of them


def searches(server: Server, count: int) -> tuple[list[threading.Thread], list[int]]:
    """So many at once, which have been started, and the statuses of those that are answered."""
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(server("/api/search?query=circle")[0])) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads, statuses


def test_a_full_line_says_come_back_and_the_server_goes_on(indexed: Path, trained: Path) -> None:
    with serving(indexed, trained, "--queue", "2") as small:
        threads, statuses = searches(small, 40)
        for thread in threads:
            thread.join()
        assert len(statuses) == 40 and set(statuses) == {200, 503}
        status, _, _ = small("/healthz")
        assert status == 200
        assert small("/api/search?query=circle")[0] == 200


def test_a_stop_answers_what_is_under_way(indexed: Path, trained: Path) -> None:
    with serving(indexed, trained) as stopping:
        threads, statuses = searches(stopping, 20)
        while int(re.findall(r"emcl_waiting (\d+)", stopping("/metrics")[2].decode())[0]) < 5 and not statuses:
            time.sleep(0.001)
        assert stopping.stop() in (0, -signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert statuses and set(statuses) == {200}
    assert "Traceback" not in stopping.log.read_text()


def test_an_index_made_anew_meanwhile_is_searched(indexed: Path, trained: Path, tmp_path: Path, clip: Path) -> None:
    import shutil

    shutil.copytree(indexed.parent, tmp_path / "copy")
    index, videos = tmp_path / "copy" / "index", tmp_path / "copy" / "videos"
    with serving(index, trained) as running:
        assert running.json("/api/facts")["windows"] == 12
        shutil.copy(clip, videos / "new.mp4")
        VideoIndex(index, emcl.load(trained, device="cpu"), windows=Windows()).update(videos)
        hits = running.json("/api/search/video?top=2", clip.read_bytes(), Content_Type="video/mp4")["hits"]
        assert {hit["path"] for hit in hits} == {clip.name, "new.mp4"}


def test_the_port_that_is_taken_is_named(indexed: Path, trained: Path, server: Server, tmp_path: Path) -> None:
    command = ["serve", str(indexed), "--model", str(trained), "--port", str(server.port)]
    done = emcl_command(*command, cwd=tmp_path)
    assert done.returncode == 2 and re.match(r"error: cannot listen at 127.0.0.1:\d+", done.stderr.splitlines()[-1])


def test_schemathesis_finds_no_failure(server: Server) -> None:
    """Every operation of the description, with right and wrong input; a body of video is a real one."""
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", "--max-examples", "15", "--seed", "1"]
    command.append(f"http://127.0.0.1:{server.port}/openapi.json")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-6000:]
