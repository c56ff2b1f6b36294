"""A wheel in an environment of its own, in a folder that is no checkout: it prepares, trains, evaluates and serves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np

from conftest import ROOT, TINY, launch_environment
from emcl.prepare.writer import encode_mp4


def test_a_wheel_in_a_clean_environment_prepares_trains_evaluates_and_serves(tmp_path: Path) -> None:
    """The environment has the dependencies and the wheel; the checkout and the editable install are not in it.

    It lies in somebody else's repository, and a file of the working directory has a name of the standard library's.
    """
    emcl = wheel_environment(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    environment = {**launch_environment(), "PATH": f"{emcl.parent}:/usr/bin:/bin"}

    def output(*command: str) -> str:
        done = subprocess.run([str(emcl), *command], cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "retrieval" in output("tasks")
    assert "sample" in output("config", "--list")
    assert "batch_size: 64" in output("config", "--task", "retrieval")
    (work / "secrets.py").write_text("raise SystemExit('a file of the working directory was imported')")
    clips = work / "clips"
    clips.mkdir()
    rows = []
    for number in range(6):
        video = encode_mp4([np.full((32, 32, 3), 40 * number, np.uint8)] * 6, fps=3)
        (clips / f"{number}.mp4").write_bytes(video)
        rows.append(f"{number}.mp4,a clip of shade {number},{'train' if number < 4 else 'test'}")
    (work / "table.csv").write_text("file,caption,split\n" + "\n".join(rows))
    output("prepare", "folder", "--videos", "clips", "--annotations", "table.csv", "--out", "shards")
    shutil.copy(TINY, work / "tiny.json")
    shards = ["data.train=shards/train-000000.tar", "data.test=shards/test-000000.tar", "data.val=null"]
    quick = [
        "model.name=tiny.json",
        "data.image_size=32",
        "data.frames=2",
        "data.max_tokens=16",
        "data.batch_size=4",
        "emcl.bases=8",
    ]
    said = output(
        "train", "--task", "retrieval", "name=one", *shards, *quick, "optim.epochs=1", "tracking.enabled=false"
    )
    assert "text_to_video" in said and "files of this run: runs/one/" in said
    scores = work / "runs/one/scores-test.json"
    assert json.loads(scores.read_text())["commit"].startswith("version ")
    scores.unlink()
    assert "text_to_video" in output("evaluate", "runs/one", "--task", "retrieval", "tracking.enabled=false")
    assert scores.is_file()
    assert "6 windows" in output("index", "clips", "--model", "runs/one", "--out", "index", "--cut", "windows")
    command = [str(emcl), "serve", "index", "--model", "runs/one", "--port", "0"]
    with subprocess.Popen(command, cwd=work, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = re.search(r"http://127.0.0.1:\d+", server.stdout.readline())
        assert address is not None
        try:
            page = urllib.request.urlopen(address[0]).read().decode()
            answer = json.loads(urllib.request.urlopen(f"{address[0]}/api/search?query=a+clip").read())
        finally:
            server.terminate()
    assert "<html" in page and len(answer["hits"]) == 6, answer


def wheel_environment(tmp_path: Path) -> Path:
    """The `emcl` of an environment in `tmp_path` with this project's wheel."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    dependencies = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(dependencies + "\n")  # appended: its own .pth files are not read
    code = "import emcl, emcl.tasks; print(emcl.__file__, emcl.tasks.__file__)"
    where = subprocess.run([python, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    assert str(ROOT) not in where
    assert where.count(str(site)) == 2
    return tmp_path / "venv" / "bin" / "emcl"
