"""Several tasks of one kind beside each other, under names of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import emcl
from conftest import TINY, emcl_command, launch, small, write_clips
from emcl.cli import main
from emcl.config import Config, from_dict, resolve, to_yaml
from emcl.errors import UserError
from emcl.multitask import VideoLanguageModel
from emcl.recipe import as_written
from emcl.registry import early_settings_of, task_entries
from emcl.report.page import compare
from emcl.run_folder import CAPTIONS, EMBEDDINGS, OPTIONS, SIMILARITY, RunFolder
from emcl.task.task_result import open_results
from emcl.train.export import save_export
from emcl.train.initialization import start_from
from emcl.train.run_config import config_of_run, find_run

pytestmark = pytest.mark.xdist_group("kinds")
KINDS = ["kinds.short=captioning", "kinds.sharp=retrieval", "kinds.brief=msrvtt_qa"]
NAMES = ["retrieval", "sharp", "captioning", "short", "msrvtt_qa", "brief"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Without Java, whose programs take seconds for each captioning task."""
    broken = tmp_path_factory.mktemp("broken") / "java"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    return {"PATH": f"{broken.parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def run(quick: dict[str, str], sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of each kind with different settings, a few steps, scored on 12 clips, which lie in `videos`."""
    folder = tmp_path_factory.mktemp("kinds")
    captions = [f"tasks.{name}.{one}" for name in ("captioning", "short") for one in ("width=64", "layers=1")]
    settings = [
        *small(sample_shards), *KINDS, *captions, "data.val=null", "name=one", "emcl.variant=compact", "emcl.bases=8",
        "tasks.captioning.generation.max_new_tokens=8", "tasks.short.generation.max_new_tokens=2",
        "tasks.short.max_tokens=6",
        "tasks.sharp.pooling_temperature=0.01", "tasks.brief.answers_kept=2", "optim.max_steps=4",
        "checkpoint.every_steps=2",
    ]  # fmt: skip
    done = launch("--task", ",".join(NAMES), *settings, cwd=folder, env=quick)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    write_clips(sample_shards, folder / "videos")
    return folder / "runs" / "one"


def test_each_has_settings_and_scores_of_its_own(run: Path) -> None:
    config = RunFolder(run).config()
    assert list(config.tasks) == NAMES and config.kind_of("short") == "captioning" == config.kind_of("captioning")
    assert (config.tasks["short"].words, config.tasks["captioning"].words) == (6, 48)
    assert len(config.tasks["brief"].answers) == 2 < len(config.tasks["msrvtt_qa"].answers)
    scores = json.loads((run / "scores-test.json").read_text())["tasks"]
    assert list(scores) == NAMES
    assert scores["retrieval"]["metrics"] != scores["sharp"]["metrics"]
    assert "of the 2 known" in scores["brief"]["protocol"]


def test_what_one_keeps_is_not_written_over_by_the_other(run: Path) -> None:
    folder = RunFolder(run)
    for name in (EMBEDDINGS, SIMILARITY, CAPTIONS):
        alias = "short" if name == CAPTIONS else "sharp"
        assert folder.kept(name, "test").is_file() and folder.kept(name, "test", alias=alias).is_file()
    short, whole = (json.loads((run / name).read_text()) for name in ("short-captions-test.json", "captions-test.json"))
    assert max(len(one["caption"].split()) for one in short) <= 2 and short != whole


def test_a_report_has_both_in_one_table(run: Path, tmp_path: Path) -> None:
    tables = {table.title: table for table in compare(open_results(run))}
    (captions,) = (table for title, table in tables.items() if "captioning" in title)
    assert [line.name for line in captions.lines if line.ours] == ["one", "one: short"]
    assert len(tables) == 3
    done = emcl_command("report", str(run), "--out", "report", cwd=tmp_path)
    assert "one: sharp" in done.stdout and "<h2>one: sharp</h2>" in (tmp_path / "report/report.html").read_text()


def test_the_one_that_is_meant_is_named(run: Path) -> None:
    clip = min((run.parent.parent / "videos").glob("*.mp4"))
    model = emcl.load(run, device="cpu")
    with pytest.raises(UserError, match="several of its tasks can caption: name one of captioning, short"):
        model.caption(clip)
    with pytest.raises(UserError, match="several of its tasks can compare .*: name one of retrieval, sharp"):
        model.similarity("a circle", clip)
    assert len(model.caption(clip, task="short")[0].split()) <= 2
    answers = {
        task: {answer for answer, _ in model.answer(clip, "what?", task=task, top=99)}
        for task in ("brief", "msrvtt_qa")
    }
    assert len(answers["brief"]) == 2 and answers["brief"] < answers["msrvtt_qa"]
    with pytest.raises(UserError, match="top=0: one prediction of a video at least"):
        model.answer(clip, "what?", task="brief", top=0)
    with pytest.raises(UserError, match="'brief' is no task of it that can caption"):
        model.caption(clip, task="brief")
    scores = [emcl.load(run, device="cpu", task=task).similarity("a circle", clip) for task in ("retrieval", "sharp")]
    assert not torch.equal(*scores)
    with pytest.raises(UserError, match="'sharpe' is no task of it that can compare.*did you mean 'sharp'"):
        emcl.load(run, device="cpu", task="sharpe")


def test_a_search_is_by_the_task_that_is_named(run: Path, tmp_path: Path) -> None:
    videos = run.parent.parent / "videos"
    assert emcl_command("index", str(videos), "--model", str(run), "--out", "index", cwd=tmp_path).returncode == 0
    outputs = {}
    for task in ("retrieval", "sharp"):
        options = ("--model", str(run), "--task", task, "--top", "12", "--json")
        outputs[task] = emcl_command("search", "index", "a red circle moves left", *options, cwd=tmp_path).stdout
    assert len(outputs["retrieval"].splitlines()) == 12 and outputs["retrieval"] != outputs["sharp"]
    done = emcl_command("search", "index", "a circle", "--model", str(run), cwd=tmp_path)
    assert done.returncode == 2 and "name one of retrieval, sharp (--task" in done.stderr.splitlines()[-1]
    done = emcl_command("serve", "index", "--model", str(run), "--port", "0", cwd=tmp_path)
    assert done.returncode == 2 and "name one of retrieval, sharp (--task" in done.stderr.splitlines()[-1]


def test_options_are_of_the_task_that_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", str(run), "--bank", "6"]) == 2
    assert "name one of retrieval, sharp" in capsys.readouterr().err
    assert main(["options", str(run), "--bank", "6", "--task", "sharp"]) == 0
    assert RunFolder(run).kept(OPTIONS, "test", alias="sharp").is_file()
    assert not RunFolder(run).kept(OPTIONS, "test").is_file()
    assert "Every inference option" in [t.title for r in open_results(run) if r.task == "sharp" for t in _tables(r)]


def _tables(result):  # type: ignore[no-untyped-def]
    from emcl.report.page import report_of

    return report_of(result).tables(result)


def test_one_is_scored_alone_and_the_run_goes_on(run: Path, quick: dict[str, str]) -> None:
    folder = run.parent.parent
    before = json.loads((run / "scores-test.json").read_text())["tasks"]
    done = launch("--evaluate", "runs/one", "--task", "short", cwd=folder, env=quick)
    assert done.returncode == 0 and "short on test" in done.stdout and "captioning on test" not in done.stdout
    after = json.loads((run / "scores-test.json").read_text())["tasks"]
    assert set(after) == set(NAMES) and after["short"]["metrics"] == pytest.approx(before["short"]["metrics"])
    done = launch("--resume", "runs/one", "optim.max_steps=6", "data.test=null", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (run / "checkpoints/step-00000006").is_dir()


def test_names_are_read_from_files_and_from_the_command_line_and_come_back() -> None:
    for kind_of in ({}, {"kind_of": early_settings_of}):
        config = resolve(["short"], overrides=["kinds.short=captioning", "tasks.short.max_tokens=40"], **kind_of)  # type: ignore[arg-type]
        assert config.tasks["short"].words == 40 and config.kind_of("short") == "captioning"
        layers = [
            {"kinds": {"short": "captioning"}, "tasks": {"short": {"words": "40"}}},
            {"kinds": {"b": "retrieval", "unused": "retrieval"}, "tasks": {"b": {}}},
        ]
        config = from_dict(layers, **kind_of)  # type: ignore[arg-type]
        assert list(config.tasks) == ["short", "b"] and config.kinds == {"short": "captioning", "b": "retrieval"}
        assert from_dict([as_written(to_yaml(config))], **kind_of) == config  # type: ignore[arg-type]
    everything = resolve(["all"], overrides=["kinds.short=captioning"])
    assert set(everything.tasks) >= {"retrieval", "captioning", "msrvtt_qa", "short"}


@pytest.mark.parametrize(
    ("tasks", "overrides", "says"),
    [
        (["short"], [], r"unknown task 'short' \(tasks: .*; a further name of one: kinds.short=TASK\)"),
        (["shrt"], ["kinds.short=captioning"], "unknown task 'shrt', did you mean 'short'"),
        (["all", "retrieval"], [], r"unknown task 'all' \(tasks: captioning, msrvtt_qa, retrieval\)$"),
        (["retrieval"], ["kinds.a=captioning"], "kinds.a=captioning: a is none of this run's tasks"),
        (["short"], ["kinds.short=${oc.env:NOBODY_SET_THIS}"], "kinds.short=.*NOBODY_SET_THIS"),
        (["short"], ["kinds.short=captionin"], r"kinds.short=captionin: unknown task 'captionin', did you mean"),
        (["retrieval"], ["kinds.retrieval=captioning"], "kinds.retrieval=captioning: retrieval is a task already"),
        (["retrieval"], ["kinds.retrieval=captioning", "tasks.retrieval.logit_scale=1"], "retrieval is a task already"),
        (["retrieval"], ["kinds.all=captioning"], "'all' is no name for a task"),
        (["retrieval"], ["kinds.a/b=captioning"], "'a/b' is no name for a task"),
        (["retrieval"], ["kinds.a.b=captioning"], r"'a.b' is no name for a task"),
        (["retrieval"], ["kinds=captioning"], r"kinds=captioning is not a table \{name: value\}"),
        (["retrieval"], ["kinds={a: captioning}", "tasks.a.max_tokens=3"], "a is none of this run's tasks"),
        (["short"], ["kinds.short=captioning", "tasks.short.wrods=3"], "unknown configuration key .*wrods"),
        (["short"], ["kinds.short=captioning", "tasks.short.max_tokens=1"], r"tasks.short.max_tokens=1 is not"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_is_refused(tasks: list[str], overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        resolve(tasks, overrides=overrides)


def test_a_name_that_pytorch_needs_itself_is_refused(sample_shards: Path, tmp_path: Path) -> None:
    done = launch("--task", "values", *small(sample_shards), "kinds.values=retrieval", "name=one", cwd=tmp_path)
    assert done.returncode == 2 and "'values' is a word of PyTorch's own" in done.stderr
    assert "kinds.OTHER=retrieval" in done.stderr and not (tmp_path / "runs").exists()


def test_an_error_is_said_of_the_file_that_has_it() -> None:
    saved = {"kinds": {"x": "captioning"}, "tasks": {"x": {"words": "35"}}}
    with pytest.raises(
        UserError, match=r"^unknown configuration key 'words'|^unknown configuration key 'tasks\.x\.words'"
    ):
        from_dict([saved], overrides=["kinds.x=retrieval"], source="F.yaml")
    with pytest.raises(
        UserError, match=r"^F.yaml: unknown task 'temporal_order' \(tasks: captioning, msrvtt_qa, retrieval\)$"
    ):
        from_dict([{"tasks": {"temporal_order": {}}}], source="F.yaml")  # its package is not here
    with pytest.raises(UserError, match=r"^F.yaml: kinds.x=captionin: unknown task"):
        from_dict([{"kinds": {"x": "captionin"}}], ["y"], overrides=["kinds.y=retrieval"], source="F.yaml")


def test_a_run_keeps_a_name_that_a_task_is_installed_under_later(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {**task_entries(), "short": task_entries()["captioning"]}
    for module in ("emcl.kinds", "emcl.config", "emcl.registry"):
        monkeypatch.setattr(f"{module}.task_entries", lambda: entries)
    assert RunFolder(run).config().kind_of("short") == "captioning"
    with pytest.raises(UserError, match="short is a task already; a further name must be new"):
        resolve(["short"], overrides=["kinds.short=captioning"])


def test_files_begin_with_the_name_of_a_task_that_is_not_this_packages_own() -> None:
    config = resolve(["short"], overrides=["kinds.short=captioning"])
    assert [config.alias_of(name) for name in ("retrieval", "short", "hash_retrieval")] == [
        "",
        "short",
        "hash_retrieval",
    ]


def test_a_run_goes_on_and_is_scored_under_its_own_names(run: Path) -> None:
    runs = f"runs={run.parent}"
    assert find_run("auto", NAMES, [runs, *KINDS]).path == run
    with pytest.raises(UserError, match="no run of .* with a whole checkpoint"):
        find_run("auto", NAMES, [runs, "kinds.short=retrieval"])
    with pytest.raises(UserError, match="kinds.short=retrieval is for a new run"):
        config_of_run(None, None, ["kinds.short=retrieval"], evaluate=None, resumed=RunFolder(run))
    for again in ([], KINDS, ["kinds={short: captioning}"], ["kinds={}"]):  # as they were typed for the training
        assert list(config_of_run(None, None, again, evaluate=None, resumed=RunFolder(run)).tasks) == NAMES
        assert list(config_of_run(["short"], None, again, evaluate=run, resumed=None).tasks) == ["short"]
    scored = config_of_run(["short"], "sample", ["tasks.short.max_tokens=40"], evaluate=run, resumed=None)
    assert scored.kind_of("short") == "captioning" and list(scored.tasks) == ["short"]


def test_the_newest_run_with_these_names_goes_on(tmp_path: Path) -> None:
    for age, (name, kinds) in enumerate({"mine": "{x: captioning}", "other": "{}", "broken": "{x: nobodys}"}.items()):
        step = tmp_path / name / "checkpoints" / "step-00000002"
        step.mkdir(parents=True)
        (step / "manifest.json").write_text("{}")
        os.utime(step, (age, age))
        tasks = "{captioning: {}, x: {}}" if "x" in kinds else "{captioning: {}}"
        (tmp_path / name / "config.yaml").write_text(f"kinds: {kinds}\ntasks: {tasks}\n")
    runs = f"runs={tmp_path}"
    assert find_run("auto", None, [runs, "kinds.x=captioning"]).name == "mine"
    assert find_run("auto", ["all"], [runs, "kinds.x=captioning"]).name == "mine"
    assert find_run("auto", ["captioning"], [runs]).name == "other"
    assert find_run("auto", None, [runs]).name == "broken"


def test_a_recipe_does_not_change_the_names_of_a_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("kinds: {short: retrieval}\ntasks: {short: {}}\n")
    scored = config_of_run(["short"], str(tmp_path / "r.yaml"), [], evaluate=run, resumed=None)
    assert scored.kind_of("short") == "captioning"
    (tmp_path / "r.yaml").write_text("kinds: {retrieval: captioning}\ntasks: {retrieval: {}}\n")
    with pytest.raises(UserError, match="retrieval is a task already"):
        config_of_run(["retrieval"], str(tmp_path / "r.yaml"), [], evaluate=run, resumed=None)


@pytest.mark.parametrize("empty", [None, "", "null", {}])
def test_an_empty_table_has_no_names(empty: object) -> None:
    config = from_dict([{"kinds": empty, "tasks": {"retrieval": {}}}], overrides=["kinds="])
    assert config.kinds == {} and "kinds" not in to_yaml(config)
    assert from_dict([{"kinds": empty}], ["a"], overrides=["kinds.a=retrieval"]).kinds == {"a": "retrieval"}


def test_learned_weights_of_losses_go_by_the_tasks_names(tmp_path: Path) -> None:
    def model(*names: str) -> tuple[VideoLanguageModel, Config]:
        kinds = [f"kinds.{name}=retrieval" for name in names if name != "retrieval"]
        more = [
            f"model.name={TINY}",
            "data.image_size=32",
            "data.max_tokens=12",
            "emcl.bases=4",
            "uncertainty_weights=true",
        ]
        config = resolve(names, overrides=[*kinds, *more])
        return VideoLanguageModel(config), config

    earlier, config = model("retrieval", "b", "c")
    with torch.no_grad():
        earlier.uncertainty.log_variance.copy_(torch.tensor([1.0, 2.0, 3.0]))  # type: ignore[union-attr]
    save_export(tmp_path / "best", earlier.state_dict(), config, {})
    later, config = model("c", "new", "retrieval")
    assert start_from(later, tmp_path / "best", config).endswith(
        "best: backbone, tasks.c, tasks.retrieval, uncertainty; new: tasks.new"
    )
    assert later.uncertainty.log_variance.tolist() == [3.0, 0.0, 1.0]  # type: ignore[union-attr]


def test_a_name_of_another_kind_in_an_earlier_run_gives_no_weights(
    run: Path, sample_shards: Path, tmp_path: Path
) -> None:
    settings = [
        *small(sample_shards),
        "data.val=null",
        "data.test=null",
        "optim.max_steps=1",
        "name=two",
        "emcl.bases=8",
    ]
    tasks = ["kinds.brief=retrieval", "kinds.sharp=retrieval", "emcl.variant=compact"]
    done = launch("--task", "brief,sharp", "--init", str(run), *settings, *tasks, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "backbone, tasks.sharp; new: tasks.brief" in done.stdout


def test_without_any_installed_task_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("emcl.kinds", "emcl.config", "emcl.registry"):
        monkeypatch.setattr(f"{module}.task_entries", dict)
    with pytest.raises(
        UserError, match=r"unknown task 'retrieval' \(tasks: none: install the package with `pip install"
    ):
        from_dict([{}], ["retrieval"])
