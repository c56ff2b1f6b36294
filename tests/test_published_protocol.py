"""The record of the published protocol: shipped recipes deviate from it only where it says so, and why."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, SHARED
from emcl.cli import main
from emcl.config import Config, flatten, resolve
from emcl.deviation_tables import BEGIN, END, against
from emcl.model.backbone import tokenizer_of
from emcl.published_protocol import Record, deviations, record_of, records, shipped_forms, unrecorded
from emcl.resources import shipped_files

FORMS = [(record.recipe, form, name) for record in records() for form, name in shipped_forms(record)]
WITH_OTHERS_SETTINGS = {"msrvtt_7k_retrieval", "vatex_retrieval"}
"""Recipes of benchmarks for which no training was published, with MSR-VTT's settings."""
AS_PUBLISHED = sorted(name for _, form, name in FORMS if form == "published_recipe")
OTHERS = {
    "precision": "fp32", "deepspeed": "deepspeed/zero2.json", "model.name": "ViT-L-14",
    "model.pretrained": "laion2b_s34b_b79k", "model.quick_gelu": "true", "model.image_weights": "a.safetensors",
    "model.temporal": "mean", "model.temporal_start": "random", "model.absent_frames": "none", "model.frozen": "[]",
    "model.head_dropout": "0.5",
    "emcl.variant": "compact", "data.train": "other", "data.mixture": "{other: 1}",
    "data.val": "other", "data.test": "other", "data.sampling": "slices", "data.resize": "ffmpeg",
    "data.augment": "rand-m9-n2", "data.resize_mode": "squash", "data.interpolation": "bilinear",
    "model.mean": "[0, 0, 0]", "model.std": "[1, 1, 1]", "model.tokenizer": "folder", "tasks.retrieval.loss": "sigmoid",
    "data.pairs": "clip", "data.captions_per_video": "1", "optim.betas": "[0.9, 0.999]",
    "optim.decay": "matrices", "optim.optimizer": "adamw", "optim.schedule": "cosine", "optim.max_steps": "10",
    "evaluate.every_steps": "151", "evaluate.select": "val", "evaluate.rescoring": "dsl",
    "tasks.retrieval.logit_scale": "10", "tasks.msrvtt_qa.answers": "[yes]", "tasks.msrvtt_qa.answers_beyond": "[no]",
    "tasks.msrvtt_qa.head": "masked", "tasks.msrvtt_qa.fusion": "product",
}  # fmt: skip
"""Other values, where flipping a truth or adding to a number does not make one."""
OF_PACKAGES = ("model.backbone", "model.regulariser")
"""Other values are the names of installed packages' parts."""
ALONGSIDE = {
    "data.keyframes": ["data.sampling=slices"],
    "data.jitter": ["data.sampling=slices"],
    "tasks.retrieval.logit_bias": ["tasks.retrieval.loss=sigmoid"],
    "model.cache_features": ["model.frozen=[image,text]", "model.absent_frames=none", "data.augment=none"],
}
"""What a value needs beside it."""


def test_every_recipe_of_a_published_benchmark_has_a_record_of_some_40_settings() -> None:
    known = records()
    named = {name for _, _, name in FORMS}
    recipes = {name for name in shipped_files("recipe") if name.endswith(("_retrieval", "_qa"))}
    assert recipes - WITH_OTHERS_SETTINGS == named
    assert len(AS_PUBLISHED) == 6
    for record in known:
        assert len(record.facts) >= 40
        assert all(fact.source or fact.unknown for fact in record.facts.values())


@pytest.mark.parametrize(("benchmark", "form", "name"), FORMS)
def test_a_shipped_recipe_has_no_unlisted_deviation_and_no_listed_one_that_it_lacks(
    benchmark: str, form: Any, name: str
) -> None:
    record, config = record_of(benchmark), resolve(None, name)
    assert unrecorded(config, record) == []
    found = deviations(config, record, form)
    assert [one for one in found if one.because is None] == []
    listed = {key for key, fact in record.facts.items() if getattr(fact, form) is not None}
    assert {one.key for one in found} == listed


@pytest.mark.parametrize("name", ["msrvtt_retrieval", "msrvtt_qa"])
def test_any_other_value_of_a_published_recipe_is_an_unlisted_deviation(name: str) -> None:
    record, recipe = record_of(name), resolve(None, f"published/{name}")
    for key in record.facts:
        given = [*ALONGSIDE.get(key, []), f"{key}={other_value(recipe, key)}"]
        if key in OF_PACKAGES:
            config = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **{key[6:]: "other"}))
        else:
            config = resolve(None, f"published/{name}", given)
        changed = {one.key for one in deviations(config, record, "published_recipe") if one.because is None}
        assert key in changed, key


def other_value(config: Config, key: str) -> str:
    if key in OTHERS:
        return OTHERS[key]
    value = flatten(config)[key]
    if isinstance(value, bool):
        return str(not value).lower()
    if value is None:
        return "1"
    if isinstance(value, int):
        return str(value + 1)
    return str(value / 2) if isinstance(value, float) else f"{value}x"


@pytest.mark.parametrize("name", ["msrvtt_retrieval", "msrvtt_qa"])
def test_another_value_in_the_record_is_noticed_too(name: str) -> None:
    record, recipe = record_of(name), resolve(None, f"published/{name}")
    for key, fact in record.facts.items():
        if key in ALONGSIDE:
            continue  # their other values do not go together with the record's
        changed = dataclasses.replace(fact, published=other_value(recipe, key))
        other = dataclasses.replace(record, facts={**record.facts, key: changed})
        assert key in {one.key for one in deviations(recipe, other, "published_recipe")}, key
        without = dataclasses.replace(record, facts={name: one for name, one in record.facts.items() if name != key})
        assert key in unrecorded(recipe, without), key


def test_another_value_of_ours_is_noticed_where_a_deviation_is_listed_and_where_none_is() -> None:
    record = record_of("msrvtt_retrieval")
    unlisted = {one.key for one in by_ours(record, "optim.backbone_lr=2e-6", "optim.lr=2e-4") if one.because is None}
    assert unlisted == {"optim.backbone_lr", "optim.lr"}
    assert "optim.backbone_lr" not in {one.key for one in by_ours(record, "optim.backbone_lr=1e-7")}
    options = {one.key for one in by_ours(record, "optim.optimizer=sgd", "optim.optimizer_options.momentum=0.8")}
    assert "optim.optimizer_options.momentum" in options


def by_ours(record: Record, *changes: str) -> list[Any]:
    return deviations(resolve(None, record.recipe, changes), record, "ours")


@pytest.mark.parametrize("name", sorted(WITH_OTHERS_SETTINGS))
def test_what_was_not_published_is_trained_as_msr_vtt_is(name: str) -> None:
    ours, other = (flatten(resolve(None, recipe)) for recipe in ("msrvtt_retrieval", name))
    assert {key for key in ours | other if ours.get(key) != other.get(key)} <= {
        "data.root", "data.train", "data.val", "data.test", "tracking.experiment",
    }  # fmt: skip


def test_what_is_said_to_be_shown_is_there() -> None:
    for record in records():
        facts = [*record.facts.values(), *record.built_in.values()]
        for shown in {fact.shown for fact in facts if fact.shown}:
            path, _, test = shown.partition("::")
            if path.startswith("golden/"):
                assert (SHARED / path).is_file() or not SHARED.exists(), shown
            else:
                assert test and f"\ndef {test}(" in (ROOT / path).read_text(), shown
        for name, fact in record.built_in.items():
            assert sum((fact.same, bool(fact.because), bool(fact.unknown))) == 1, f"{name}: as published, or why not?"
            assert fact.same == bool(fact.shown) or fact.because, f"{name}: shown by what?"


def test_the_page_has_the_tables_that_the_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, other = (ROOT / "docs/recipes.md").read_text(), tmp_path / "page.md"
    before, _, rest = text.partition(BEGIN)
    other.write_text(f"{before}{BEGIN}\nold\n{END}{rest.partition(END)[2]}")
    assert main(["config", "--deviations", str(other)]) == 0
    assert other.read_text() == text, "emcl config --deviations docs/recipes.md"
    (tmp_path / "without.md").write_text("nothing")
    (tmp_path / "binary.md").write_bytes(b"\xff\xfe")
    for wrong, said in {
        "none.md": "No such file", "": "Is a directory", "without.md": "has no lines <!--", "binary.md": "codec",
        "x" * 300: "File name too long",
    }.items():  # fmt: skip
        assert main(["config", "--deviations", f"{tmp_path}/{wrong}"]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    for others in (["optim.lr=1"], ["--recipe", "msrvtt_qa"], ["--task", "retrieval"]):
        assert main(["config", "--deviations", "-", *others]) == 2
        assert "--against BENCHMARK takes settings" in capsys.readouterr().err


def test_a_runs_own_settings_are_compared_by_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--recipe", "published/msrvtt_retrieval", "--against", "msrvtt_retrieval"]) == 0
    count = len(record_of("msrvtt_retrieval").facts)
    head, *rest = capsys.readouterr().out.splitlines()
    assert head == f"MSR-VTT 1k-A: {count} of {count} settings are as published"
    assert rest[0].startswith("not compared") and "  videos: read as downloaded" in rest
    changed = resolve(None, "published/msrvtt_qa", ["optim.lr=1e-3", "optim.optimizer_options.max_norm=1"])
    lines = against(changed, "published/msrvtt_qa", "published_recipe").splitlines()
    assert re.fullmatch(r"optim.lr +0.0001 +0.001 +\(not listed\)", lines[2]) and lines[3].startswith("not compared")
    for name in ("msrvt_qa", "emcl_net", ""):
        assert main(["config", "--recipe", "published/msrvtt_qa", "--against", name]) == 2
        assert f"no published protocol of {name!r}" in capsys.readouterr().err


def test_reasons_are_those_of_the_shipped_recipe_that_is_compared() -> None:
    other = resolve(None, "published/msrvtt_retrieval", ["optim.backbone_lr=1e-6"])
    assert "(not listed)" in against(other, "msrvtt_retrieval", "published_recipe")
    assert "(not listed)" not in against(other, "msrvtt_retrieval", "ours")


def test_a_text_has_30_tokens_between_its_start_and_end() -> None:
    tokenize = tokenizer_of(resolve(None, "published/msrvtt_retrieval", ["model.pretrained=null"]))
    (long,), (short,) = tokenize(["cat " * 40]), tokenize(["cat"])
    start, end, word = long[0], long[-1], long[1]
    assert len(long) == 32 and (long[1:-1] == word).all() and start != end
    assert short[:3].tolist() == [start, word, end] and not short[3:].any()
