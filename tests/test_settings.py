"""Settings: text is what was typed, impossible values are refused at once with what is possible, help says the same."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, emcl_command
from emcl.config import SAID, from_dict, resolve, to_yaml
from emcl.errors import UserError, one_line
from emcl.model.architecture_limits import check_limits
from emcl.recipe import as_written, read_yaml
from emcl.run_folder import RunFolder
from emcl.settings import build, group
from emcl.train.deepspeed_file import read_deepspeed
from emcl.train.run_config import config_of_run

REFUSED = {
    # numbers
    "data.frames=0": "data.frames=0 is not a whole number of frames from 1 up",
    "data.frames=-3": "from 1 up",
    "data.frames=3.5": "data.frames=3.5 is not a whole number",
    "data.frames=nan": "data.frames=nan is not a whole number",
    "data.frames=": "data.frames= is not a whole number",
    "data.frames=null": "data.frames=null is not a whole number",
    "data.frames=[8]": "data.frames=[8] is not a whole number",
    "data.frames=1e999": "is not a whole number",
    "data.batch_size=0": "a whole number of clips from 1 up",
    "data.workers=-1": "a whole number of processes from 0 to 1024",
    "data.fps=0": "a number of frames a second above 0, or null",
    "data.patience=0": "a number of seconds above 0",
    "data.max_bad_fraction=1.5": "from 0 to 1",
    "data.cache_gib=-1": "a number of GiB from 0 to 1000000",
    "optim.lr=-1": "optim.lr=-1 is not a number above 0",
    "optim.lr=0": "optim.lr=0 is not a number above 0",
    "optim.lr=nan": "optim.lr=nan is not a finite number above 0",
    "optim.lr=inf": "optim.lr=inf is not a finite number above 0",
    "optim.lr=-.inf": "optim.lr=-.inf is not a number",
    "optim.lr=fast": "optim.lr=fast is not a number above 0",
    "optim.backbone_lr=-1e-7": "from 0 up",
    "optim.epochs=0": "a whole number of epochs from 1 to 1000000",
    "optim.epochs=true": "a whole number of epochs",
    "optim.max_steps=0": "a whole number of steps from 1 up, or null",
    "optim.warmup=1.1": "from 0 to 1",
    "optim.accumulation=0": "from 1 up",
    "emcl.iterations=0": "from 1 up",
    "emcl.temperature=0": "above 0",
    "emcl.momentum=2": "from 0 to 1",
    "evaluate.tile=0": "from 1 up",
    "evaluate.dsl_temperature=0": "above 0",
    "evaluate.rescoring=dls": "evaluate.rescoring=dls is none of none, dsl, qb_norm, did you mean 'dsl'?",
    "evaluate.rescoring_options.temperature=1": "evaluate.rescoring_options.temperature: none has no settings",
    "evaluate={rescoring: dsl, rescoring_options: {temperature: 0}}": "rescoring_options.temperature=0 is not a number",
    "evaluate.rescoring=qb_norm": "evaluate.rescoring=qb_norm needs a bank of training samples",
    "evaluate={dsl: true, rescoring: dsl}": "evaluate.rescoring=dsl is what dsl=true asks for already",
    "evaluate.every_epochs=0": "a whole number of epochs from 1 up",
    "checkpoint.keep=0": "from 1 up",
    "checkpoint.every_steps=0": "from 1 up",
    "tracking.every_steps=0": "from 1 up",
    "patience=0": "above 0",
    "seed=-1": "from 0 to below 4294967296",
    "tasks.retrieval.weight=-1": "tasks.retrieval.weight=-1 is not a number from 0 up",
    "tasks.retrieval.pooling_temperature=0": "above 0",
    "tasks.captioning.dropout=1": "from 0 to below 1",
    "tasks.captioning.width=200": "tasks.captioning.width=200",
    "tasks.captioning.generation.num_beams=0": "generation.num_beams=0 is not a whole number from 1 up",
    "tasks.captioning.generation.top_p=1.5": "above 0 up to 1",
    "tasks.captioning.generation.max_new_tokens=49": "is not a whole number of tokens from 1 to 48",
    "tasks.msrvtt_qa.answers=[]": "1 or more texts",
    # what the model has room for
    "data.frames=78": "data.frames=78 is not a whole number from 1 to 77",
    "emcl.bases=193": "emcl.bases=193 is not a whole number from 1 to 192, the width of tiny",
    "data.max_tokens=33": "data.max_tokens=33 is not a whole number from 2 to 32",
    "data.image_size=224": "data.image_size=224 is not 64",
    # lists and tables
    "optim.betas=[0.9]": "optim.betas=[0.9] is not a list [one, two] of 2 numbers from 0 to below 1",
    "optim.betas=[]": "optim.betas=[] is not a list",
    "optim.betas=[0.9, 1]": "optim.betas=[0.9, 1] is not a list",
    "optim.betas=[0.9, nan]": "optim.betas=[0.9, nan] is not a list",
    "optim.betas=0.9": "optim.betas=0.9 is not a list",
    "model.frozen=image": "model.frozen=image is not a list [one, two] of texts",
    "data.mixture={}": "data.mixture={} is not a table",
    "data.mixture=3": "data.mixture=3 is not a table {name: value}",
    "data.mixture={a: 0}": "data.mixture.a=0 is not a number above 0",
    "data.mixture={a: 1, b: inf}": "data.mixture.b=inf is not a finite number above 0",
    "data.mixture.a=-1": "data.mixture.a=-1 is not a number above 0",
    "data.mixture.=3": "unknown configuration key 'data.mixture.'",
    "data.mixture={a: 1, a: 2}": "a stands twice in {a: 1, a: 2}",
    "data.mixture={: 1}": "data.mixture={: 1} is not a table",
    "data.mixture={a: 1: 2}": "data.mixture={a: 1: 2} is not a table",
    "data.mixture={a: 1e300}": "data.mixture.a=1e300 is not a number above 0 up to",
    "data.mixture={a: {b: 1}}": "data.mixture.a={b: 1} is not a number above 0",
    # choices
    "precision=fp8": "precision=fp8 is not one of fp32, bf16, fp16, clip_fp16, did you mean 'fp32'?",
    "precision=": "is not one of",
    "model.temporal=lstm": "is not one of transformer, mean",
    "emcl.variant=refrence": "did you mean 'reference'?",
    "data.pairs=captions": "did you mean 'caption'?",
    "tasks.msrvtt_qa.fusion=sum": "tasks.msrvtt_qa.fusion=sum is not one of concat, product",
    "emcl.enabled=maybe": "emcl.enabled=maybe is not true or false",
    # names
    "name=../outside": "name='../outside' is no name of a folder in `runs`",
    "name=/tmp/outside": "is no name of a folder",
    "name=a/b": "is no name of a folder",
    "name=..": "is no name of a folder",
    "name=.": "is no name of a folder",
    "name=a\nb": "is no name of a folder",
    "optim.lrr=1": "unknown configuration key 'optim.lrr', did you mean 'lr'? (keys here: lr, backbone_lr,",
    "otpim.lr=1": "did you mean 'optim'?",
    "optim=3": "optim=3 is no group of settings",
    "optim=null": "optim=null is no group of settings",
    "optim={lr: 1": "optim={lr: 1 is no group of settings",
    "optim.lr.=3": "unknown configuration key 'optim.lr.', did you mean 'lr'?",
    "data.={}": "unknown configuration key 'data.'",
    "seed.x=3": "seed={x: 3} is not a whole number",
    "optim.lr.x=3": "optim.lr",
    "tasks.retrieval=3": "tasks.retrieval=3 is no group of settings",
    "tasks.retrieval.wieght=1": "did you mean 'weight'?",
    "tasks.retreival.weight=1": "unknown task 'retreival', did you mean 'retrieval'?",
    "tasks=retrieval": "--task names the tasks",
    "=3": "is not key=value",
    "optim.lr": "is not key=value",
    "model.name=": "model.name=",
    "data.train=": "data.train=",
    "data.val=${data.rot}/x.tar": "data.rot",
    "data.val=${data.val}": "data.val",
    "name=${oc.env:HOME}": "is no name of a folder",
    f"name={'é' * 101}": "nor be longer than 200 bytes",
    "name= ": "it may not be blank",
    "runs=": "runs= is not text, not empty",
    "precision=a\nb": r"precision=a\nb is not one of",
    f"seed={'9' * 5000}": "999... is not a whole number",
    f"model.frozen={'[' * 3000}": "is not a list",
    "model.cache_features=true": "model.cache_features=true wants model.frozen=[image,text]",
    "data.workers=2000": "from 0 to 1024",
    "data.cache_gib=1e308": "from 0 to 1000000",
    "optim.epochs=1000000000000": "from 1 to 1000000",
    "deepspeed=": "no such deepspeed file",
    "deepspeed=.": "no such deepspeed file",
    f"deepspeed={'z' * 300}": "no such deepspeed file",
    f"model.name={'z' * 300}": "unknown model.name",
}


def outcomes(calls: list[list[str]]) -> list[Any]:
    """Status, standard error, seconds and whether PyTorch came along, of calls of the launch command in one process."""
    code = """
import contextlib, io, json, runpy, sys, time
main = runpy.run_path(sys.argv[1])["main"]
outcomes = []
for arguments in json.loads(sys.stdin.read()):
    errors, start = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
    outcomes.append((status, errors.getvalue(), time.monotonic() - start, "torch" in sys.modules))
print(json.dumps(outcomes))
"""
    command = [sys.executable, "-c", code, str(ROOT / "platform" / "launch.py")]
    done = subprocess.run(command, input=json.dumps(calls), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def launched(*arguments: str) -> Any:
    return outcomes([list(arguments)])[0]


@cache
def tried() -> dict[str, Any]:
    """Of each wrong value."""
    return dict(zip(REFUSED, outcomes([["--task", "all", "--dry-run", override] for override in REFUSED]), strict=True))


@pytest.mark.parametrize("override", REFUSED)
def test_a_wrong_value_is_refused_in_one_line_with_what_is_possible_and_without_torch(override: str) -> None:
    status, said, _, torch = tried()[override]
    assert status == 2
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert REFUSED[override] in said
    assert not torch


@pytest.mark.parametrize(
    "typed",
    [
        "0012",
        "2024_11_26",
        "12:30",
        "1e5",
        "on",
        "no",
        "1.0",
        "0x1f",
        "01",
        "2024-11-26",
        "'quoted'",
        "[a]",
        r"\${seed}",
    ],
)
def test_a_name_is_what_was_typed_on_the_command_line_and_in_the_runs_own_file(typed: str, tmp_path: Path) -> None:
    config = resolve(["retrieval"], overrides=[f"name={typed}", f"tracking.experiment={typed}"])
    kept = typed.removeprefix("\\")
    assert (config.name, config.tracking.experiment) == (kept, kept)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_dict([read_yaml(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("typed", ["0012", "2024_11_26", "12:30", "1e5", "on"])
def test_a_name_is_what_a_recipe_says(typed: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"include: [recipe/sample]\nname: {typed}\n")
    assert resolve(["retrieval"], str(recipe)).name == typed


def test_words_of_lists_are_what_was_typed() -> None:
    config = resolve(["msrvtt_qa"], overrides=["tasks.msrvtt_qa.answers=[yes, no, 12, null, 1e5, 'a, b']"])
    assert config.tasks["msrvtt_qa"].answers == ["yes", "no", "12", "null", "1e5", "a, b"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("{msrvtt_frames: 3, sample: 1}", {"msrvtt_frames": 3.0, "sample": 1.0}),
        ("{shards/a-{000..003}.tar: 3, sample: 1}", {"shards/a-{000..003}.tar": 3.0, "sample": 1.0}),
        ("{../a/t-{0..9}.tar: .5}", {"../a/t-{0..9}.tar": 0.5}),
        ("{a-{0,1}.tar::b-{0..1}.tar: 2}", {"a-{0,1}.tar::b-{0..1}.tar": 2.0}),
        ("{s3://bucket/a-{0..3}.tar: 1, C:/b.tar: 2}", {"s3://bucket/a-{0..3}.tar": 1.0, "C:/b.tar": 2.0}),
        ("{'a, b.tar': 1}", {"a, b.tar": 1.0}),
        ("{it's.tar: 1, that's.tar: 2}", {"it's.tar": 1.0, "that's.tar": 2.0}),
        ("{a:1,b:2}", {"a": 1.0, "b": 2.0}),
        ("null", None),
    ],
)
def test_a_mixture_takes_patterns_of_shards(typed: str, expected: Any, tmp_path: Path) -> None:
    assert resolve(["retrieval"], overrides=[f"data.mixture={typed}"]).data.mixture == expected


def test_a_pattern_is_a_key_of_a_mixture_too() -> None:
    given = ["data.mixture={sample: 1}", "data.mixture.shards/a-{000..003}.tar=2"]
    assert resolve(["retrieval"], overrides=given).data.mixture == {"sample": 1.0, "shards/a-{000..003}.tar": 2.0}


@pytest.mark.parametrize(
    ("override", "of", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.lr=1E-4", "optim.lr", 1e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.grad_clip=0", "optim.grad_clip", 0.0),
        ("optim.betas=[0.8, 0.9]", "optim.betas", [0.8, 0.9]),
        ("optim.max_steps=null", "optim.max_steps", None),
        ("optim.max_steps=", "optim.max_steps", None),
        ("emcl.enabled=False", "emcl.enabled", False),
        ("emcl.enabled=true", "emcl.enabled", True),
        ("data.val=null", "data.val", None),
        ("data.test=${data.root}/x.tar", "data.test", "shards/x.tar"),
        ("model.frozen=[image, text]", "model.frozen", ["image", "text"]),
        ("model.frozen=[]", "model.frozen", []),
        ("optim={lr: 0.5, epochs: 2}", "optim.epochs", 2),
        ("data.train=a-{000..003}.tar::b.tar", "data.train", "a-{000..003}.tar::b.tar"),
    ],
)
def test_values_are_read_by_their_type(override: str, of: str, value: Any) -> None:
    setting: Any = resolve(["retrieval"], overrides=[override])
    for key in of.split("."):
        setting = getattr(setting, key)
    assert setting == value and type(setting) is type(value)


def test_the_last_of_several_layers_counts_and_keeps_the_rest(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("include: [recipe/sample]\noptim:\n  lr: 0.5\n  betas: [0.5, 0.6]\n")
    config = resolve(["retrieval"], str(recipe), ["optim.betas=[0.7, 0.8]", "optim.betas=[0.1, 0.2]"])
    assert (config.optim.lr, config.optim.betas) == (0.5, [0.1, 0.2])
    assert config.data.batch_size == resolve(["retrieval"]).data.batch_size


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optim: 3\n", "optim=3 is no group of settings"),
        ("optim: {lr: nan}\n", "optim.lr=nan is not a finite number above 0"),
        ("optim: {betas: [0.9]}\n", "optim.betas=[0.9] is not a list"),
        ("tasks: [retrieval]\n", "tasks="),
        ("tasks: {retrieval: {wieght: 1}}\n", "did you mean 'weight'?"),
        ("tasks: {retreival: {}}\n", "did you mean 'retrieval'?"),
        ("optim: {lr: 1\n", "not readable YAML"),
        ("- 1\n", "holds no `key: value`"),
        ("", "holds no `key: value`"),
        ("data: {mixture: [a, b]}\n", "data.mixture=[a, b] is not a table"),
        ("optim: {lr: 1}\nseed: 1\noptim: {eps: 1}\n", "line 1: 'optim' stands twice in one group"),
        ("seed: 1\noptim: [\n", "not readable YAML: line 3: "),
        ("include: mine.yaml\n", "mine.yaml includes itself"),
        ("include: {a: b}\n", "include={'a': 'b'} is not a list"),
        ("include: [[a]]\n", "is not a list"),
        ("include: [recipe/sampel]\n", "did you mean 'sample'?"),
        ("optim: {lr: nan}\n", "mine.yaml: optim.lr"),
        ("tasks: {retrieval: {}, captioning: {layers: 0}}\n", "mine.yaml: tasks.captioning.layers=0 is not a whole"),
        ("optim: &o {eps: *o}\n", "not readable YAML: Circular"),
        ("seed: |\n  1\n  x\n", "seed=1"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(
    text: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        resolve(["retrieval"], "mine.yaml")
    assert named in one_line(caught.value)


def test_a_wrong_recipe_is_named_beside_right_overrides_too(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim: {lr: nan}\n")
    with pytest.raises(UserError, match=rf"^{recipe}: optim\.lr=nan is not"):
        resolve(["retrieval"], str(recipe), ["seed=1"])


def test_a_wrong_override_of_a_right_recipe_is_not_the_recipes() -> None:
    with pytest.raises(UserError, match=r"^optim\.lr=0 is not"):
        resolve(["retrieval"], overrides=["optim.lr=0"])


@pytest.mark.parametrize(
    ("tasks", "override", "named"),
    [
        (["retrieval"], "tasks.captioning.layers=2", "captioning is none of this run's tasks (retrieval)"),
        (["retrieval"], "tasks.captioning.wieght=2", "captioning is none of this run's tasks"),
        (None, "tasks.msrvtt_qa.weight=2", "msrvtt_qa is none of this run's tasks (retrieval)"),
        (["retrieval"], "tasks.captionin.layers=2", "unknown task 'captionin', did you mean 'captioning'?"),
    ],
)
def test_a_setting_of_a_task_that_the_run_has_not_is_refused(
    tasks: list[str] | None, override: str, named: str
) -> None:
    with pytest.raises(UserError) as caught:
        resolve(tasks, "msrvtt_retrieval", [override])
    assert named in str(caught.value)


def test_values_of_other_settings_are_taken_as_text_and_tasks_have_some_too() -> None:
    config = resolve(["retrieval"], overrides=["name=${seed}", "optim.lr=${tasks.retrieval.weight}"])
    assert (config.name, config.optim.lr) == ("0", 1.0)


def test_overrides_are_held_against_the_run_that_goes_on(tmp_path: Path) -> None:
    """Not against the defaults: this run's captions may have 80 tokens, and its frames no order."""
    saved = resolve(
        ["captioning"],
        overrides=["tasks.captioning.max_tokens=80", "model.temporal=mean", "name=mine", "data.frames=90"],
    )
    (tmp_path / "config.yaml").write_text(to_yaml(saved).replace("name: mine", "name: group/mine"))
    written = tmp_path / "checkpoints/step-00000004/manifest.json"
    written.parent.mkdir(parents=True)
    written.write_text("{}")
    override = "tasks.captioning.generation.max_new_tokens=60"
    config = config_of_run(None, None, [override], evaluate=None, resumed=RunFolder(tmp_path))
    assert (config.tasks["captioning"].generation.max_new_tokens, config.name) == (60, "mine")
    status, said, _, torch = launched("--resume", str(tmp_path), "model.temporal=transformer")
    assert (status, torch) == (2, False) and "data.frames=90 is not a whole number from 1 to 77" in said
    status, said, _, torch = launched("--resume", str(tmp_path), "--task", "retrieval")
    assert (status, torch) == (2, False) and "goes on with its own tasks (captioning), not with retrieval" in said
    status, said, _, torch = launched("--resume", str(tmp_path / "none"))
    assert (status, torch) == (2, False) and "no run's folder" in said


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"embed_dim": -1}, "embed_dim or context_length is no number above 0"),
        ({"embed_dim": True}, "embed_dim or context_length is no number above 0"),
        ({"embed_dim": "64"}, "embed_dim or context_length is no number above 0"),
        ({"text_cfg": {"context_length": None}}, "embed_dim or context_length is no number above 0"),
        ({"text_cfg": 3}, "is no architecture in open_clip's format"),
        ({"vision_cfg": []}, "vision_cfg no table"),
    ],
)
def test_an_architecture_with_wrong_numbers_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**json.loads((ROOT / "configs/model/tiny.json").read_text()), **change}))
    config = resolve(["retrieval"], overrides=[f"model.name={path}"])
    with pytest.raises(UserError, match=f"^{path} is no architecture in open_clip's format") as caught:
        check_limits(config)
    assert named in one_line(caught.value)


def test_a_model_without_the_layer_may_be_narrower_than_its_bases() -> None:
    config = resolve(["retrieval"], overrides=["emcl.bases=500", "emcl.enabled=false"])
    check_limits(config)
    with pytest.raises(UserError, match=r"emcl\.bases=500 is not a whole number from 1 to 192"):
        check_limits(resolve(["retrieval"], overrides=["emcl.bases=500"]))


def test_an_entry_for_a_mixture_that_is_no_table_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.mixture={a: 1 is not a table"):
        resolve(["retrieval"], overrides=["data.mixture={a: 1", "data.mixture.b=2"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--task", ","], "argument --task: no task is named"),
        (["--task", "retrieval", "--profile", "0"], "argument --profile: 0 is not a whole number from 1 up"),
        (["--task", "retrieval", "--optim.lr=1"], "unrecognized arguments: --optim.lr=1"),
        (["--help", "nosuch"], "--help nosuch: no group and no key"),
        ([], "--task NAME or --recipe NAME is needed"),
        (["--task", "retrieval", "data.train=a-{0..3"], "a-{0..3 is no pattern of shards"),
        (["--task", "retrieval", f"data.train={'x' * 300}"], "is no pattern of shards: "),
        (["--task", "retrieval", "optim.accumulation=3"], "data.batch_size=64 is not divisible"),
        (["--task", "retrieval", "data.train=a\nb"], r"no shard matches a\nb"),
        (["--recipe", "."], "no such recipe file: ."),
    ],
)
def test_options_that_are_wrong_are_refused_in_one_line_and_without_torch(arguments: list[str], named: str) -> None:
    status, said, _, torch = launched(*arguments)
    assert (status, torch) == (2, False)
    assert said.startswith("error: ") and said.count("\n") == 1 and named in said


def test_a_group_without_fields_refuses_any_key_in_one_line() -> None:
    with pytest.raises(UserError, match=r"unknown configuration key 'tasks\.plain\.x' \(keys here: none\)"):
        build(group(type("Plain", (), {})), {"x": "1"}, "tasks.plain.")


def test_groups_of_a_recipe_may_be_empty_or_merged_from_others(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "optim:\n  # lr: 1\ntasks:\n  retrieval:\nevaluate: &few {batch_size: 7}\ndata: {<<: *few, frames: 3}\n"
    )
    config = resolve(None, str(recipe))
    assert (list(config.tasks), config.optim.lr) == (["retrieval"], 1e-4)
    assert (config.data.batch_size, config.data.frames) == (7, 3)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "mine.json is not JSON"),
        ("[]", "mine.json holds no settings of DeepSpeed"),
        ('{"zero_optimization": 3}', "zero_optimization=3 is no table"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage=4 is not one of 0, 1, 2, 3"),
        ('{"zero_optimization": {"stage": "1"}}', "zero_optimization.stage='1' is not one of"),
        ('{"bf16": {}}', "sets 'bf16', which comes from the configuration"),
        ("{}", "precision=fp16 trains wrong without ZeRO"),
    ],
)
def test_a_wrong_deepspeed_file_is_refused_in_one_line(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(text)
    config = resolve(["retrieval"], overrides=[f"deepspeed={tmp_path / 'mine.json'}", "precision=fp16"])
    with pytest.raises(UserError) as caught:
        read_deepspeed(config)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipes_own_tasks_are_printed(tmp_path: Path) -> None:
    done = emcl_command("config", "--recipe", "msrvtt_frames_all", cwd=tmp_path)
    (tmp_path / "out.yaml").write_text(done.stdout)
    assert set(read_yaml(tmp_path / "out.yaml")["tasks"]) == {"retrieval", "captioning", "msrvtt_qa"}
    done = emcl_command("config", "--recipe", "msrvtt_retrieval", "--task", "captioning", cwd=tmp_path)
    (tmp_path / "out.yaml").write_text(done.stdout)
    assert set(read_yaml(tmp_path / "out.yaml")["tasks"]) == {"captioning"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "optim: lr, backbone_lr"),
        (["optim"], "optim.betas=[0.9, 0.98]   (a list [one, two] of 2 numbers from 0 to below 1)"),
        (["data.frames"], "data.frames=12   (a whole number of frames from 1 up)"),
        (["tasks.captioning"], "tasks.captioning.generation.num_beams=5"),
        (["run"], "seed=0"),
    ],
)
def test_help_says_what_the_fields_say(words: list[str], said: str, tmp_path: Path) -> None:
    script = str(ROOT / "platform" / "launch.py")
    done = subprocess.run([sys.executable, script, "--help", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert said in done.stdout


FORMER = {
    "optim.clip_lr=0.5": "optim.backbone_lr=0.5",
    "data.words=20": "data.max_tokens=20",
    "data.size=32": "data.image_size=32",
    "emcl.k=7": "emcl.bases=7",
    "tasks.captioning.words=30": "tasks.captioning.max_tokens=30",
}
TASKS = ["retrieval", "captioning"]
SHORT = "tasks.captioning.generation.max_new_tokens=5"


@pytest.mark.parametrize(("former", "now"), FORMER.items())
def test_a_former_name_of_a_setting_works_and_one_line_says_the_new_one(
    former: str, now: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(SAID, raising=False)
    config = resolve(TASKS, overrides=[SHORT, former])
    assert config == resolve(TASKS, overrides=[SHORT, now, former])  # the last of two counts, as ever
    key, new = former.partition("=")[0], now.partition("=")[0]
    assert [record.message for record in caplog.records] == [
        f"{key} is {new} now; its old name works for one release more"
    ]
    kept = to_yaml(config).replace(f" {new.rpartition('.')[2]}:", f" {key.rpartition('.')[2]}:")
    monkeypatch.delenv(SAID)
    assert from_dict([as_written(kept)]) == config
    assert len(caplog.records) == 1, "what a run has kept is nobody's mistake"
    monkeypatch.setenv("RANK", "1")
    assert resolve(TASKS, overrides=[SHORT, former]) == config
    assert len(caplog.records) == 1, "one line, not one a rank"
    owner = config
    for name in key.split(".")[:-1]:
        owner = owner[name] if isinstance(owner, dict) else getattr(owner, name)
    assert getattr(owner, key.rpartition(".")[2]) == getattr(owner, new.rpartition(".")[2]), "others' code reads it so"


def test_a_recipe_of_before_works_with_what_it_refers_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(SAID, raising=False)
    (tmp_path / "mine.yaml").write_text(
        "include: data/sample\ndata: {words: 20}\nemcl: {k: '${data.words}'}\noptim: {clip_lr: 1e-6}\n"
        "tasks: {retrieval: {}}\n"
    )
    config = resolve(None, str(tmp_path / "mine.yaml"), ["emcl.iterations=${data.words}", "data.image_size=48"])
    assert (config.emcl.bases, config.emcl.iterations, config.data.max_tokens) == (20, 20, 20)
    assert (config.optim.backbone_lr, config.data.image_size) == (1e-6, 48)
    assert sorted(record.message.split()[0] for record in caplog.records) == ["data.words", "emcl.k", "optim.clip_lr"]
    (tmp_path / "mine.yaml").write_text("data: {words: 20, max_tokens: 21}\ntasks: {retrieval: {}}\n")
    with pytest.raises(UserError, match=r"mine.yaml: data.words is data.max_tokens now: give it once"):
        resolve(None, str(tmp_path / "mine.yaml"))
    with pytest.raises(UserError, match=r"^data.max_tokens=1 is not a whole number"):
        resolve(["retrieval"], overrides=["data.words=1"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "recipe").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_recipes_use_no_former_name(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(SAID, raising=False)
    resolve(["retrieval"], str(path))
    assert not caplog.records


def test_a_former_name_is_reported_once_by_a_command_and_found_by_help(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(SAID, raising=False)
    done = emcl_command("config", "--task", "retrieval", "optim.clip_lr=0.25", "emcl.k=3", cwd=tmp_path)
    assert "backbone_lr: 0.25" in done.stdout and "clip_lr" not in done.stdout
    assert len(done.stderr.strip().splitlines()) == 2, done.stderr
    assert (
        "optim.clip_lr is optim.backbone_lr now"
        in emcl_command("config", "--help", "optim.clip_lr", cwd=tmp_path).stdout
    )
