"""The worked examples of docs/extending.md do as the page stands what the page says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from conftest import ROOT, Outcome, emcl_command, launch, run_program, small, write_clips
from worked_examples import PAGE, example_commands, example_files

pytestmark = pytest.mark.xdist_group("serve")
FILES = example_files()


def run(command: list[str], *settings: str, cwd: Path, env: dict[str, str]) -> Outcome:
    """A command of the page; one that trains gets further `settings`, which make it small."""
    program, *arguments = command
    if program == "deepspeed":
        done = launch(*arguments[1:], *settings, cwd=cwd, env=env)
    elif program == "emcl":
        done = emcl_command(*arguments, cwd=cwd, env=env)
    else:
        script, *arguments, _, redirected = arguments
        done = run_program(cwd / script, *arguments, cwd=cwd, env=env)
        (cwd / redirected).write_text(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_table_counts_files_and_lines() -> None:
    """A part is one file and two lines that make it known; the platform has none of them."""
    registered = FILES["pyproject.toml"].splitlines()
    rows = re.findall(r"^\| \[.*?\| ([^|]*) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    named = set()
    for files, lines in rows:
        names = re.findall(r"`([^`]+)`", files)
        registering = [line for line in registered if any(f'"{Path(name).stem}' in line for name in names)]
        assert len(names) + bool(registering) <= 2
        assert int(lines) == sum(len(FILES[name].splitlines()) for name in names) + len(registering), names
        named |= set(names)
    assert len(rows) == 7 and named == set(FILES) - {"pyproject.toml"}
    package = tomllib.loads(FILES["pyproject.toml"])
    assert {f"{module}.py" for module in package["tool"]["setuptools"]["py-modules"]} == named - {
        "to_table.py", "cooking.yaml",
    }  # fmt: skip


def test_the_examples_are_as_clean_as_ours(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_task(installed: dict[str, str], sample_shards: Path, tmp_path: Path) -> None:
    train, report, predict = example_commands("A task")
    retrieval = ["--task", "retrieval", *small(sample_shards), "data.val=null", "data.test=null", "name=NAME"]
    assert launch(*retrieval, "optim.max_steps=1", cwd=tmp_path).returncode == 0
    done = run(train, *small(sample_shards), "optim.max_steps=3", cwd=tmp_path, env=installed)
    assert "temporal_order on test" in done.stdout and "retrieval on test" not in done.stdout
    assert "hidden: 32" in (tmp_path / "runs/order/best/config.yaml").read_text()
    assert "| order |" in run(report, cwd=tmp_path, env=installed).stdout
    write_clips(sample_shards, tmp_path / "videos")
    min((tmp_path / "videos").iterdir()).rename(tmp_path / "FILE.mp4")
    assert re.search("in order|shuffled", run(predict, cwd=tmp_path, env=installed).stdout)


def test_a_data_set(installed: dict[str, str], sample_shards: Path, tmp_path: Path) -> None:
    """Its clips are halves of the sample's, of which two are for the test."""
    write_clips(sample_shards, tmp_path / "videos")
    for name in ("to_table.py", "cooking.yaml"):
        (tmp_path / name).write_text(FILES[name])
    clips = [
        {
            "video": path.name,
            "seconds": [half * 0.5, half * 0.5 + 0.5],
            "subset": "testing" if number == 0 else "training",
            "sentences": [f"stir it {number} times", f"clip {number}, half {half}"],
            "questions": [{"q": "which half?", "a": f"half {half}"}],
        }
        for number, path in enumerate(sorted((tmp_path / "videos").iterdir())[:5])
        for half in (0, 1)
    ]
    (tmp_path / "annotations.json").write_text(json.dumps({"clips": clips}))
    to_table, prepare, verify, train = example_commands("A data set")
    for command in (to_table, prepare, verify):
        run(command, cwd=tmp_path, env=installed)
    index = json.loads((tmp_path / "shards/cooking/index.json").read_text())
    assert {name: split["samples"] for name, split in index["splits"].items()} == {"train": 8, "test": 2}
    own = [setting for setting in small(sample_shards) if not re.match(r"data\.(train|val|test)=", setting)]
    own += ["optim.max_steps=2", "name=run", "precision=fp32", "emcl.bases=8", "model.pretrained=null"]
    done = run(train, *own, cwd=tmp_path, env=installed)
    assert "retrieval on test" in done.stdout and "msrvtt_qa on test" in done.stdout
    assert "4 texts x 2 videos" in (tmp_path / "runs/run/scores-test.json").read_text()
