"""What must fail fails before the work: nothing is encoded, opened or made for a result that cannot be."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import emcl_command, short_run
from emcl import inference, launch
from emcl.cli import main
from emcl.prepare import sharding
from emcl.report.options import every_option
from emcl.search import index
from emcl.search.windows import Windows
from emcl.serve.server import bind


@pytest.fixture(scope="module")
def with_layer(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_run(sample_shards, tmp_path_factory.mktemp("layer"))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what takes long may be reached."""

    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("the work has begun")

    for module, name in ((inference, "load"), (sharding, "prepare_shards")):
        monkeypatch.setattr(module, name, reached)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("index videos --model RUN --out file", "--out file: a file, not a folder"),
        ("index videos --model RUN --out file/index", "file is a file"),
        ("index videos --model RUN --out new --overlap 10 --window 10", "--overlap 10 is not below --window 10"),
        ("search new words --model RUN", "new: no index there"),
        ("search made --queries gone.txt --model RUN", "gone.txt: no such file"),
        ("search made --video gone.mp4 --model RUN", "gone.mp4: no such file"),
        ("caption file gone.mp4 --model RUN", "gone.mp4: no such file"),
        ("ask gone.mp4 what --model RUN", "gone.mp4: no such file"),
        ("serve new --model RUN", "new: no index there"),
        ("unpack shards.tar --out file", "--out file: a file, not a folder"),
        ("report run --out file", "--out file: a file, not a folder"),
        ("bundle --out videos", "--out videos: a folder, not a file"),
        ("towers --out file/towers", "file is a file"),
        ("prepare sample --out file", "--out file: a file, not a folder"),
        ("prepare sample --out link", "--out link: a file, not a folder"),
        ("prepare folder --videos videos --annotations table.csv --out file", "--out file: a file, not a folder"),
        ("prepare folder --videos videos --annotations table.csv --out ftp://there/x", "not by ftp:"),
        ("prepare folder --videos videos --annotations table.csv --out file://{here}/file/x", "not to be written"),
    ],
)
def test_what_cannot_be_written_or_read_is_named_first(
    command: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("videos", "made", "run"):
        Path(folder).mkdir()
    for file in ("file", "made/clips.sqlite"):
        Path(file).touch()
    Path("link").symlink_to("nowhere")
    Path("table.csv").write_text("file,caption\na.mp4,a thing\n")
    before = sorted(tmp_path.rglob("*"))
    assert main(command.format(here=tmp_path).split()) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_without_its_package_is_named_before_shards_are_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_work: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)  # as where it is not installed
    Path("table.csv").write_text("file,caption\na.mp4,a thing\n")
    command = ["prepare", "folder", "--videos", ".", "--annotations", "table.csv", "--out", "s3://bucket/x"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "s3fs" in said and "none were made" in said and not Path("shards").exists()


@pytest.mark.usefixtures("no_work")
def test_a_port_that_is_taken_is_named_before_a_model_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clips.sqlite").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path), "--model", "run", "--port", port]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err
    with bind("127.0.0.1", 0) as taken, pytest.raises(inference.UserError, match="cannot listen at"):
        bind("127.0.0.1", taken.getsockname()[1])  # while the first one opens its model


def test_a_run_whose_folder_is_read_only_is_refused_before_it_is_scored(
    with_layer: Path, sample_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert main(["evaluate", str(with_layer), f"data.test={sample_shards}/test-000000.tar"]) == 2
    assert "may not be written to: score a copy of it" in capsys.readouterr().err
    with pytest.raises(inference.UserError, match="may not be written to"):
        every_option(with_layer)


def test_a_place_for_runs_that_is_none_is_refused_before_pytorch_is_imported(
    tmp_path: Path, launched: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").touch()
    assert main(["train", "--task", "retrieval", f"runs={tmp_path}/runs"]) == 2
    assert f"runs={tmp_path}/runs: {tmp_path}/runs is a file" in capsys.readouterr().err and not launched


def test_a_layer_beside_the_models_own_is_refused_before_a_video_is_encoded(
    with_layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(b"none")
    command = ["index", str(tmp_path / "videos"), "--model", str(with_layer), "--emcl", "--out", str(tmp_path / "new")]
    assert main([*command, "--device", "cpu"]) == 2
    assert "was trained with an EMCL layer of its own" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    made = index.VideoIndex(tmp_path / "new", inference.load(with_layer, device="cpu"), windows=Windows())
    monkeypatch.setattr(made, "_add", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(inference.UserError, match="an EMCL layer of its own"):
        made.update(tmp_path / "videos", emcl=True)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that this process would have become."""
    kept: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda _, command, __: kept.append(command))
    return kept


def test_emcl_train_says_what_is_wrong_before_it_becomes_the_launcher(
    with_layer: Path,
    launched: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, named in (
        (["train", "--task", "retrieva"], "unknown task 'retrieva', did you mean 'retrieval'?"),
        (["train", "--task", "retrieval", "optim.lr=-1"], "optim.lr=-1 is not"),
        (["train", "--task", "retrieval", "data.train=gone/*.tar"], "no shard matches gone/*.tar"),
        (["evaluate", "nowhere"], "nowhere: no such directory"),
        (["evaluate", str(with_layer)], "data.test names no shards to evaluate on"),
        (["evaluate", str(with_layer), "data.test=gone.tar"], "no shard matches gone.tar"),
        (["evaluate", "--task", "retrieval", "nowhere", "evaluate.dsl=true"], "nowhere: no such directory"),
    ):
        assert main(arguments) == 2
        assert named in capsys.readouterr().err
    assert not launched
    for arguments in (["train"], ["evaluate"], ["train", "--resume", "--recipe", "sample"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2 and f"(see emcl {arguments[0]} --help)" in capsys.readouterr().err
    main(["train", "--task", "retrieval", "name=mine", "data.mixture={sample: 1}"])
    (command,) = launched
    assert command[1:] == [
        "-m", "deepspeed.launcher.runner", "--module", "emcl.launch",
        "--task", "retrieval", "name=mine", "data.mixture={sample: 1}",
    ]  # fmt: skip


def test_emcl_evaluate_scores_the_tasks_that_are_named(
    with_layer: Path, sample_shards: Path, launched: list[list[str]]
) -> None:
    settings = [f"data.test={sample_shards}/test-000000.tar", "evaluate.dsl=true"]
    main(["evaluate", "--task", "retrieval", str(with_layer), *settings])
    assert launched[0][5:] == ["--evaluate", str(with_layer), "--task", "retrieval", *settings]


def test_a_name_that_is_taken_is_refused_before_pytorch_is_imported(
    launched: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path, sample_shards: Path
) -> None:
    (tmp_path / "one/best").mkdir(parents=True)
    command = ["train", "--task", "retrieval", f"data.train={sample_shards}/train-*.tar", "data.val=null"]
    assert main([*command, "data.test=null", f"runs={tmp_path}", "name=one"]) == 2
    assert "one is a run already (best): another name= begins another" in capsys.readouterr().err
    assert not launched


def test_output_that_nobody_reads_on_is_no_error(tmp_path: Path) -> None:
    shell = f"{sys.executable} -m emcl.cli config --describe | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (0, 141) and done.stderr == "" and done.stdout.startswith("# ")


def test_help_of_what_is_launched_comes_without_the_launcher(tmp_path: Path) -> None:
    for command, named in (("train", "emcl train --recipe msrvtt_retrieval"), ("evaluate", "usage: emcl evaluate")):
        done = emcl_command(command, "--help", cwd=tmp_path)
        assert done.returncode == 0 and named in done.stdout and "--module emcl.launch" in done.stdout
    assert launch.LAUNCHED in launch.train_parser(launch.LAUNCHED).format_help()
