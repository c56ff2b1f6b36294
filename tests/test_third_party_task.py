"""The registry is open: a package that somebody else installs adds tasks, with no change here.

One task is that of docs/extending.md, the other that of tests/third_party. They train, are scored, reported, asked
about videos on the command line, by the API and on the page, as ours are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from conftest import emcl_command, launch, small, write_clips
from test_page import browser, opened, search, until  # noqa: F401
from test_serve import Server, serving

pytestmark = pytest.mark.xdist_group("serve")
ALL = "retrieval,msrvtt_qa,temporal_order,sentence_fit,again"


@pytest.fixture(scope="module")
def trained(installed: dict[str, str], sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of their tasks beside ours, three steps long, in a folder with the test clips in `videos`."""
    folder = tmp_path_factory.mktemp("third")
    settings = [*small(sample_shards), "optim.max_steps=3", "emcl.variant=compact", "emcl.bases=8", "name=run"]
    settings += ["kinds.again=temporal_order", "data.val=null"]
    done = launch("--task", ALL, *settings, cwd=folder, env=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    write_clips(sample_shards, folder / "videos")
    return folder / "runs/run"


@pytest.fixture(scope="module")
def server(installed: dict[str, str], trained: Path) -> Iterator[Server]:
    folder = trained.parent.parent
    done = emcl_command("index", "videos", "--model", str(trained), "--out", "index", cwd=folder, env=installed)
    assert done.returncode == 0, done.stderr
    with serving(folder / "index", trained, env=installed) as running:
        yield running


@pytest.fixture
def clip(trained: Path) -> Path:
    return min((trained.parent.parent / "videos").glob("*.mp4"))


def test_the_command_lists_them(installed: dict[str, str], tmp_path: Path) -> None:
    done = emcl_command("tasks", env=installed, cwd=tmp_path)
    assert {"temporal_order", "sentence_fit", "retrieval"} <= set(done.stdout.split())


def test_on_two_ranks_the_same_samples_are_scored(
    installed: dict[str, str], trained: Path, sample_shards: Path, tmp_path: Path
) -> None:
    """What the base class gathers does not depend on who has seen it."""
    shutil.copytree(trained, tmp_path / "run")
    done = launch("--evaluate", "run", "--task", "temporal_order", ranks=2, cwd=tmp_path, env=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    alone, shared = (
        json.loads((run / "items-temporal_order-test.json").read_text()) for run in (trained, tmp_path / "run")
    )
    assert len(alone["id"]) == 12 and shared["certainty"] == pytest.approx(alone["certainty"], abs=1e-3)
    assert {**shared, "certainty": 0} == {**alone, "certainty": 0}


def test_files_of_two_tasks_with_one_scorer_begin_with_their_names(trained: Path) -> None:
    assert {path.name for path in trained.glob("*shuffled-test.txt")} == {
        "temporal_order-shuffled-test.txt", "again-shuffled-test.txt",
    }  # fmt: skip


def test_a_report_shows_tables_intervals_and_examples_of_theirs(
    installed: dict[str, str], trained: Path, tmp_path: Path
) -> None:
    done = emcl_command("report", str(trained), "--out", "report", cwd=tmp_path, env=installed)
    assert done.returncode == 0, done.stderr
    order = done.stdout.partition("temporal order")[2].partition("##")[0]
    scores = json.loads((trained / "scores-test.json").read_text())["tasks"]["temporal_order"]
    assert "| | accuracy | |" in order and f"| run | {scores['metrics']['accuracy']:.1f} (" in order
    assert "12 videos, every other one shuffled" in order
    page = (tmp_path / "report/report.html").read_text()
    of_order = page.partition("run: temporal order")[2].partition("run: sentence fit")[0]
    for wanted in ("<h3>Best</h3>", "<h3>Worst</h3>", "shown in order", "found so by", 'src="data:image/jpeg'):
        assert wanted in of_order, wanted


def test_commands_say_what_they_predict(installed: dict[str, str], trained: Path, clip: Path) -> None:
    def emcl(*arguments: str) -> Any:
        return emcl_command(*arguments, "--model", str(trained), cwd=trained, env=installed)

    done = emcl("predict", str(clip), str(clip), "--task", "temporal_order", "--json")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == second and {one["text"] for one in first["predictions"]} == {"in order", "shuffled"}
    assert sum(one["probability"] for one in first["predictions"]) == pytest.approx(1)
    assert emcl("ask", str(clip), "a red circle", "--task", "sentence_fit").stdout.split()[1] in ("yes", "no")
    assert (
        "several of its tasks can answer: name one of msrvtt_qa, sentence_fit"
        in emcl("ask", str(clip), "is it?").stderr
    )
    assert "no task that it was trained for can caption" in emcl("caption", str(clip)).stderr
    assert "sentence_fit is asked a question" in emcl("predict", str(clip), "--task", "sentence_fit").stderr
    asked = emcl("predict", str(clip), "--task", "temporal_order", "--question", "which?")
    assert "temporal_order is asked no question" in asked.stderr and asked.returncode == 2


def test_the_api_says_what_they_predict(server: Server, clip: Path) -> None:
    offers = {offer["task"]: offer for offer in server.json("/api/facts")["offers"]}
    assert list(offers) == ["msrvtt_qa", "temporal_order", "sentence_fit", "again"]
    assert offers["temporal_order"]["question"] is None and offers["sentence_fit"]["button"] == "Does it fit?"
    number = server.json("/api/search/video?top=1", clip.read_bytes(), Content_Type="video/mp4")["hits"][0]["window"]
    of_window = f"/api/windows/{number}/predict"
    sent = server.json("/api/predict/temporal_order", clip.read_bytes(), Content_Type="video/mp4")["predictions"]
    assert server.json(f"{of_window}/temporal_order")["predictions"] == [
        {"text": one["text"], "probability": pytest.approx(one["probability"], abs=1e-4)} for one in sent
    ]
    fit = server.json(f"{of_window}/sentence_fit?question={quote('a circle')}&top=1")["predictions"]
    assert fit[0]["text"] in ("yes", "no") and fit[0]["probability"] >= 0.5 and len(fit) == 1
    for path, status, says in (
        (f"{of_window}/retrieval", 404, "'retrieval' is no task of it that can say"),
        (f"{of_window}/nobody", 404, "msrvtt_qa, temporal_order, sentence_fit, again can"),
        (f"{of_window}/sentence_fit", 422, "query.question: Field required"),
        (f"{of_window}/temporal_order?question=which", 422, "is asked no question"),
        (f"/api/windows/{number}/answer?question=x", 404, "sentence_fit (--task, task= or /api/predict/TASK)"),
        (f"/api/windows/{number}/caption", 404, "no task that it was trained for can caption"),
    ):
        code, _, body = server(path)
        assert code == status and says in json.loads(body)["detail"], path


def test_the_page_has_their_buttons(browser: Any, server: Server) -> None:  # noqa: F811
    wrong: list[str] = []
    page = opened(browser, server, wrong)
    search(page, "a circle")
    page.locator("#hits button").first.click()
    assert page.locator("#offers button").all_inner_texts() == [
        "Ask", "In order? (temporal_order)", "Does it fit?", "In order? (again)",
    ]  # fmt: skip
    page.click("text=In order? (again)")
    said = "/(in order|shuffled) \\(\\d+%\\), (in order|shuffled)/"
    until(page, f"{said}.test(document.querySelector('#said').textContent)")
    page.fill("[data-task=sentence_fit] input", "a red circle moves left")
    page.click("text=Does it fit?")
    until(page, "/(yes|no) \\(\\d+%\\)/.test(document.querySelector('#said').textContent)")
    assert wrong == []
    page.close()
