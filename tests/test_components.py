"""Backbone, regulariser, optimiser, schedule and rescoring are chosen by name, and another package brings more.

Theirs are the examples of docs/extending.md.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from math import isnan
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from emcl.tasks.retrieval_report import RetrievalReport
from safetensors.torch import load_file
from torch import Tensor

import emcl
from conftest import TINY, launch, mlflow_run, recorded, small
from emcl import components
from emcl.cli import main
from emcl.components import BACKBONES, OPTIMIZERS, REGULARISERS, RESCORINGS, SCHEDULES, check_components
from emcl.config import Config, fingerprint_text, from_dict, resolve, to_yaml
from emcl.config_docs import explain
from emcl.data.batch import videos_of
from emcl.distributed import ALONE, Ranks
from emcl.em import Moments
from emcl.errors import UserError
from emcl.metrics.rescoring import DualSoftmax, Rescoring, check_rescoring, described, rescoring_of
from emcl.model.backbone import Backbone, build_backbone, tokenizer_of
from emcl.model.regulariser import Regulariser, regulariser_of
from emcl.model.similarity import similarity, similarity_by_tile, similarity_on_ranks
from emcl.report.options import _rescorings, every_option
from emcl.run_folder import saved_config
from emcl.settings import group
from emcl.task import Variant
from emcl.train import run as run_module
from emcl.train.checkpoint import find
from emcl.train.engine import _check_regularisers, deepspeed_settings
from emcl.train.flops import flops_where_known
from emcl.train.optimizer import OptimizerKind, build_optimizer
from emcl.train.plan import plan
from emcl.train.schedule import build_schedule
from emcl.train.train_settings import OptimConfig
from ranks import run_on_ranks
from worked_examples import example_commands, example_settings

pytestmark = pytest.mark.xdist_group("serve")
WIDTH = 16
DEFAULTS = "acca7485338420d8"
"""Of the settings' text, as the version had it that wrote the first indexes that count."""


@pytest.fixture
def theirs(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Their package, also for this process."""
    monkeypatch.syspath_prepend(installed["PYTHONPATH"])
    return Path(installed["PYTHONPATH"])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP as transformers keeps one."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("hf") / "clip"
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**size, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    shape = CLIPConfig(text_config={**size, "max_position_embeddings": 32}, vision_config=vision, projection_dim=24)
    CLIPModel(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(
    installed: dict[str, str],
    clip_folder: Path,
    sample_shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two tasks on two ranks with nothing but their components, chosen as docs/extending.md chooses each."""
    folder = tmp_path_factory.mktemp("components")
    settings = [
        *small(sample_shards), *recorded(folder),
        *example_settings("A backbone"), f"model.name={clip_folder}", f"model.pretrained={clip_folder}",
        *example_settings("A regulariser"), *example_settings("An optimiser, and a schedule"),
        "data.image_size=32", "data.max_tokens=24", "optim.max_steps=4", "name=run", "data.val=null",
        "tracking.every_steps=1",
    ]  # fmt: skip
    done = launch("--task", "retrieval,msrvtt_qa", *settings, ranks=2, cwd=folder, env=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs/run"


def test_a_run_of_theirs_alone_trains_is_scored_and_says_so(trained: Path) -> None:
    metrics = mlflow_run(trained.parent.parent)[1].data.metrics
    assert {"train/retrieval/contrastive", "train/retrieval/regulariser", "train/msrvtt_qa/regulariser"} <= set(metrics)
    scores = json.loads((trained / "scores-test.json").read_text())["tasks"]["retrieval"]
    assert scores["protocol"].endswith("; MeanRemoved")
    config = (trained / "best/config.yaml").read_text()
    for line in ("backbone: hf_clip", "strength: '0.5'", "optimizer: lion", "beta1: '0.8'", "schedule: inverse_root"):
        assert line in config


def test_its_export_compares_as_it_was_trained(trained: Path, theirs: Path) -> None:
    model = emcl.load(trained, device="cpu")
    videos = [torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8) for _ in range(3)]
    features, texts = model.encode_video(videos), model.encode_text(["a red circle", "a dog runs"])
    common = F.normalize(model.model.heads["retrieval"].emcl.common, dim=0)
    assert float(common.norm()) == pytest.approx(1)

    def moved(rows: Tensor) -> Tensor:
        return rows - 0.5 * (rows @ common)[..., None] * common

    weights = (torch.einsum("ad,btd->abt", texts, features.frames) / 3.0).softmax(-1) * features.mask
    pooled = torch.einsum("abt,btd->abd", weights, features.frames)
    cosine = F.cosine_similarity(moved(pooled), moved(texts)[:, None], dim=-1)
    wanted = cosine - 0.25 * F.normalize(features.mean(), dim=1) @ common
    torch.testing.assert_close(model.similarity(texts, features), wanted, atol=1e-5, rtol=1e-5)
    assert len(model.answer(features, "what is it?", top=2)) == 2


def test_scores_and_options_have_their_inference_trick(
    trained: Path,
    installed: dict[str, str],
    theirs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By hand from the similarity that the run has kept, and beside the dual softmax."""
    run = shutil.copytree(trained, tmp_path / "runs/NAME")
    monkeypatch.chdir(tmp_path)
    (_, _, *evaluate), (_, *options) = example_commands("An inference trick")
    done = launch(*evaluate, "evaluate.dsl=true", "--task", "retrieval", cwd=tmp_path, env=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    of_retrieval = json.loads((run / "scores-test.json").read_text())["tasks"]["retrieval"]
    metrics = of_retrieval["metrics"]
    assert of_retrieval["protocol"].endswith("; MeanRemoved; rescored besides: DSL, Z-norm (strength=0.5)")
    scores_QG = load_file(run / "similarity-test.safetensors")["similarity"].double()
    owner_Q = torch.tensor(json.loads((run / "items-retrieval-test.json").read_text())["video"])
    by_text, by_video = (
        (scores - 0.5 * scores.mean(0)) / scores.std(0, correction=0).sqrt() for scores in (scores_QG, scores_QG.T)
    )
    sets_GG = torch.stack([by_video[:, owner_Q == video].amax(1) for video in range(len(by_video))], dim=1)
    for way, scores, right in (("text_to_video", by_text, owner_Q), ("video_to_text", sets_GG, torch.arange(12))):
        ranks = (scores >= scores.gather(1, right[:, None])).sum(1)
        assert metrics[f"{way}_z_norm_transductive/MnR"] == pytest.approx(ranks.double().mean().item())
    assert {"text_to_video_dsl_transductive/R@1", "text_to_video/R@1"} <= set(metrics)
    assert main([*options, "--bank", "10"]) == 0
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    kinds = {name: kind for layer, name, kind, *_ in table[2:] if layer == "none"}
    assert kinds == {
        "none": "inductive", "DSL": "transductive", "QB-Norm": "inductive", "Z-norm (strength=0.5)": "transductive",
    }  # fmt: skip
    own = next(cells for cells in table if cells[0].startswith("its own") and cells[1].startswith("Z-norm"))
    mean_rank = table[0].index("t2v MnR")
    assert float(own[mean_rank]) == pytest.approx(metrics["text_to_video_z_norm_transductive/MnR"], abs=0.06)
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    report = capsys.readouterr().out
    assert "NAME, Z-norm" in report and "NAME, DSL" in report


def test_a_report_tells_a_trick_of_a_package_that_is_gone_and_its_odd_name() -> None:
    name = "a_transductive_b"
    metrics = {"text_to_video/R@1": 1.0, "text_to_video_as_published/R@1": 2.0}
    metrics |= {f"text_to_video_{name}_inductive/R@1": 3.0, f"video_to_text_{name}_inductive/MdR": 4.0}
    variants = RetrievalReport().variants(SimpleNamespace(metrics=metrics))
    assert variants == [
        Variant(name, "inductive", {"text_to_video/R@1": 3.0, "video_to_text/MdR": 4.0}),
    ]


def test_options_leave_out_a_trick_that_cannot_be_used_unless_it_is_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = [EntryPoint(name="theirs", value="nowhere:Thing", group=RESCORINGS.group)]
    monkeypatch.setattr(components, "entry_points", lambda group, name="theirs": theirs if name == "theirs" else [])
    evaluate = resolve(["retrieval"], overrides=["evaluate.dsl_temperature=0.05"]).evaluate
    assert [label for label, _ in _rescorings(evaluate)] == ["none", "DSL (temperature=0.05)", "QB-Norm"]
    assert "left out: evaluate.rescoring=theirs: nowhere:Thing of its package cannot be imported" in caplog.text
    chosen = replace(evaluate, rescoring="qb_norm", rescoring_options={"temperature": "0.1"})
    label, rescoring = _rescorings(chosen)[-1]
    assert label == "QB-Norm (temperature=0.1)" and rescoring == type(rescoring)(0.1)
    with pytest.raises(UserError, match=r"^evaluate\.rescoring=theirs: nowhere:Thing"):
        _rescorings(replace(evaluate, rescoring="theirs"))


@group
class Shift(Rescoring):
    by: float


def test_a_part_that_is_a_dataclass_has_the_settings_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = dataclass(type("Kind", (OptimizerKind,), {"config_class": Shift}))
    monkeypatch.setattr(components.Components, "load", lambda *_: kind)
    assert OPTIMIZERS.options("theirs", {"by": "2"}) == Shift(by=2.0)


def test_a_trick_whose_setting_has_to_be_given_is_described_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components.Components, "load", lambda *_: Shift)
    assert described("shift", rescoring_of("shift", {"by": "2"})) == "shift (by=2.0)"
    with pytest.raises(UserError, match=r"^evaluate\.rescoring_options\.by has to be given: a number$"):
        check_rescoring("shift", {})


def test_options_refuse_a_setting_that_changes_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^evaluate\.dsl changes no option here: evaluate\.tile, "):
        every_option(tmp_path, ["evaluate.dsl=true"])


def test_without_the_package_the_run_is_refused_by_name(trained: Path) -> None:
    with pytest.raises(UserError, match=r"model\.backbone=hf_clip is none of open_clip"):
        emcl.load(trained)


def test_an_evaluation_does_without_the_package_of_an_optimiser() -> None:
    usual = resolve(["retrieval"])
    for optim in (replace(usual.optim, optimizer="lion"), replace(usual.optim, schedule="inverse_root")):
        config = replace(usual, optim=optim)
        check_components(config, training=False)
        with pytest.raises(UserError, match=r"^optim\.(optimizer=lion|schedule=inverse_root) is none of"):
            check_components(config)


def test_its_checkpoint_goes_on_with_its_ranks_and_optimiser_alone(
    trained: Path, theirs: Path, installed: dict[str, str]
) -> None:
    folder, config = trained.parent.parent, saved_config(trained / "best")
    for changes, says in (
        ({}, "with optim.optimizer=lion it goes on with 2 ranks and deepspeed=deepspeed/zero1.json alone"),
        ({"optimizer": "adamw"}, "was begun with optim.optimizer=lion and does not go on with adamw: --init takes"),
        ({"optimizer_options": {}}, r"optim.optimizer_options={beta1: 0.8} and does not go on with {}"),
        ({"schedule": "cosine"}, "optim.schedule=inverse_root and does not go on with cosine"),
    ):
        optim = replace(config.optim, **changes)
        with pytest.raises(UserError, match=says.replace("{", r"\{")):
            find(trained / "checkpoints", ALONE, 1, replace(config, optim=optim))
    more = launch("--resume", "runs/run", "optim.max_steps=5", "data.test=null", ranks=2, cwd=folder, env=installed)
    assert more.returncode == 0 and "goes on from step 4 of 5" in more.stdout


def test_a_backbone_of_transformers_gives_its_own_features(theirs: Path, clip_folder: Path) -> None:
    from transformers import CLIPModel

    names = [f"model.name={clip_folder}", f"model.pretrained={clip_folder}"]
    config = resolve(
        ["retrieval"], overrides=["model.backbone=hf_clip", *names, "data.image_size=32", "data.max_tokens=24"]
    )
    backbone, clip = build_backbone(config).eval(), CLIPModel.from_pretrained(clip_folder).eval()
    frames = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    ids = tokenizer_of(config)(["a dog runs", "two people cook"])
    assert torch.equal(ids, backbone.tokenize(["a dog runs", "two people cook"]))
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.encode_frames(frames),
            clip.visual_projection(clip.vision_model(backbone.preprocess(frames)).pooler_output),
        )
        torch.testing.assert_close(
            backbone.encode_text(ids),
            clip.text_projection(clip.text_model(ids, attention_mask=(ids != 0).long()).pooler_output),
        )
        video = backbone.encode_video(videos_of([frames[:2].numpy(), frames[2:].numpy()], 2))
    assert video.shape == (2, 2, 24)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.backbone=hf_clp", "model.backbone=hf_clp is none of open_clip, hf_clip, did you mean 'hf_clip'?"),
        (
            "model.regulariser=",
            "is none of emcl, mean_removed (or install the package that brings it)",
        ),
        ("optim.optimizer=lyon", "optim.optimizer=lyon is none of adamw, bert_adam, sgd, lion, did you mean 'lion'?"),
        ("optim.schedule=x", "optim.schedule=x is none of cosine, warmup_cosine, linear, constant, inverse_root"),
        ("evaluate.rescoring=znorm", "is none of none, dsl, qb_norm, z_norm, did you mean 'z_norm'?"),
        ("evaluate.rescoring_options.strength=2", "evaluate.rescoring_options.strength=2 is not a number from 0 to 1"),
        ("evaluate.rescoring_options.temperature=0", "rescoring_options.temperature=0 is not a number above 0"),
        ("evaluate.rescoring_options.bank=1", "bank: none has no settings of its own (evaluate.rescoring_options={} "),
        (
            "optim.optimizer_options.beta1=0.5",
            "beta1: adamw has no settings of its own (optim.optimizer_options={} ",
        ),
        ("optim.optimizer_options.momentum=1", "optim.optimizer_options.momentum=1 is not a number from 0 to below 1"),
        ("model.regulariser_options.strenth=1", "key 'model.regulariser_options.strenth', did you mean 'strength'?"),
        ("model.backbone_options.attention=null", None),
    ],
)
def test_a_wrong_name_or_option_is_refused_in_one_line(theirs: Path, override: str, says: str | None) -> None:
    chosen = {
        "strenth": "model.regulariser=mean_removed", "momentum": "optim.optimizer=sgd",
        "strength": "evaluate.rescoring=z_norm", "temperature": "evaluate.rescoring=dsl",
    }  # fmt: skip
    more = [setting for word, setting in chosen.items() if word in override]
    if says is None:
        check_components(resolve(["retrieval"], overrides=["model.backbone=hf_clip", override]))
        return
    with pytest.raises(UserError) as caught:
        config = resolve(["retrieval"], overrides=[override, *more])
        check_rescoring(config.evaluate.rescoring, config.evaluate.rescoring_options)
        check_components(config)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_help_lists_what_is_installed_with_its_settings(theirs: Path) -> None:
    assert "Here: adamw, bert_adam, sgd, lion (--help optim.optimizer_options: " in explain("optim.optimizer")
    assert explain("optim.schedule").endswith("Here: cosine, warmup_cosine, linear, constant, inverse_root")
    options = explain("optim.optimizer_options")
    assert "  with optim.optimizer=adamw: nothing\n" in options
    assert "with optim.optimizer=lion:\n  optim.optimizer_options.beta1=0.9   (a number from 0 to below 1)" in options
    assert "How much of mean and deviation counts." in explain("evaluate.rescoring_options")


def test_help_on_options_names_a_broken_package_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint(name="theirs", value="nowhere:Thing", group=OPTIMIZERS.group)
    registered = {OPTIMIZERS.group: [entry]}
    monkeypatch.setattr(components, "entry_points", lambda group, name=None: registered.get(group, []))
    options = explain("optim.optimizer_options")
    assert "optim.optimizer=theirs: nowhere:Thing of its package cannot be imported" in options
    assert "optim.optimizer_options.momentum=0.9" in options


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("nowhere:Thing", "nowhere:Thing of its package cannot be imported: No module named 'nowhere'"),
        ("json:Thing", "json:Thing of its package cannot be imported: module 'json' has no attribute 'Thing'"),
        ("json:dumps", "does not extend emcl.model.backbone.Backbone"),
        ("json:JSONEncoder", "does not extend emcl.model.backbone.Backbone"),
    ],
)
def test_a_package_that_registers_nothing_of_use_is_named(
    value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = EntryPoint(name="theirs", value=value, group=BACKBONES.group)
    monkeypatch.setattr(components, "entry_points", lambda **_: [entry])
    with pytest.raises(UserError) as caught:
        BACKBONES.load_class("theirs", Backbone)
    assert str(caught.value).startswith("model.backbone=theirs: ") and says in str(caught.value)


def test_a_backbone_that_looks_at_values_trains_without_mfu_and_is_planned_by_an_estimate(
    theirs: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device there are none to look at."""
    import hf_clip

    plain = hf_clip.TextTrunk.forward
    monkeypatch.setattr(hf_clip.TextTrunk, "forward", lambda self, ids: plain(self, ids) * float(ids.float().sum() > 0))
    names = ["model.backbone=hf_clip", f"model.name={clip_folder}", "data.image_size=32", "data.max_tokens=24"]
    config = resolve(["retrieval"], overrides=[*names, "data.train=none", "data.generate=false"])
    assert flops_where_known(config) is None
    assert isnan(plan(config)[0].activations)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.image_size=64", "data.image_size=64 is not the 32 of the model"),
        ("optim.optimizer_options.x=1", "optim.optimizer_options.x: adamw has no settings"),
    ],
)
def test_what_would_fail_later_is_found_before_the_work_and_in_a_plan(
    theirs: Path, clip_folder: Path, override: str, says: str
) -> None:
    names = [
        "model.backbone=hf_clip",
        f"model.name={clip_folder}",
        "data.image_size=32",
        "data.max_tokens=24",
        "data.train=none",
    ]
    config = resolve(["retrieval"], overrides=[*names, "data.generate=false", override])
    for find_it in (plan, lambda config: run_module._check(config, ALONE, training=True)):
        with pytest.raises(UserError, match=says):
            find_it(config)


def _with_regulariser(ranks: Ranks, folder: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, loss and state of their regulariser, fitted to the rows of all ranks."""
    sys.path.insert(0, folder)
    config = resolve(["retrieval"], overrides=["model.regulariser=mean_removed"])
    layer = regulariser_of(config, WIDTH)
    assert layer is not None
    generator = torch.Generator().manual_seed(0)
    text, frames = torch.randn(8, WIDTH, generator=generator) + 1, torch.randn(8, 3, WIDTH, generator=generator) + 1
    mask = torch.ones(8, 3, dtype=torch.bool)
    own = ranks.share(8)
    scores = similarity(text[own], frames, mask, temperature=3.0, regulariser=layer, ranks=ranks)
    loss = layer.loss(text[own], frames[own], mask[own], ranks)
    assert loss is not None
    return ranks.gather_rows(scores), ranks.sum(loss), layer.common


def test_their_regulariser_gives_the_same_on_two_ranks(theirs: Path, tmp_path: Path) -> None:
    (wanted,) = run_on_ranks(_with_regulariser, 1, tmp_path, str(theirs))
    assert float(wanted[1]) > 0 and float(wanted[2].norm()) > 0
    for results in run_on_ranks(_with_regulariser, 2, tmp_path, str(theirs)):
        for one, other in zip(results, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (DualSoftmax(), "does not extend emcl.metrics.rescoring.Rescoring"),
        (DualSoftmax, None),
        (type("Plain", (Rescoring,), {}), None),
        (type("OfAGroup", (group(type("Base", (Rescoring,), {})),), {}), "OfAGroup extends a group of settings"),
    ],
)
def test_a_rescoring_is_a_class_and_one_that_extends_a_group_is_one(
    kind: object, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components.Components, "load", lambda *_: kind)
    if says is None:
        assert isinstance(rescoring_of("theirs"), Rescoring)
        return
    with pytest.raises(UserError) as caught:
        rescoring_of("theirs")
    assert says in str(caught.value) and str(caught.value).startswith("evaluate.rescoring=theirs: ")


@pytest.mark.parametrize("find_it", [plan, lambda config: run_module._check(config, ALONE, training=False)])
def test_an_evaluation_has_no_bank_for_a_rescoring(find_it: Callable[[Config], object]) -> None:
    config = resolve(["retrieval"], overrides=["evaluate.rescoring=qb_norm", "data.train=none", "data.generate=false"])
    with pytest.raises(UserError, match=r"^evaluate\.rescoring=qb_norm needs a bank .* `emcl options RUN` scores it$"):
        find_it(config)


def test_one_that_does_nothing_changes_nothing() -> None:
    text, frames, mask = torch.randn(5, WIDTH), torch.randn(4, 3, WIDTH), torch.ones(4, 3, dtype=torch.bool)
    plain = similarity(text, frames, mask, temperature=3.0)
    nothing = Regulariser()
    torch.testing.assert_close(similarity(text, frames, mask, temperature=3.0, regulariser=nothing), plain)
    assert nothing(text, frames) == (text, frames) and nothing.loss(text, frames, mask) is None


class Tiles(Regulariser):
    """Says of which tile it was."""

    transductive = True

    def adjust(self, scores_AB: Tensor, text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        return torch.full_like(scores_AB, float(scores_AB.shape[1]))


class Looks(Regulariser):
    def adjust(self, scores_AB: Tensor, text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        return scores_AB if scores_AB.max() < 2 else text_AD


def test_rows_of_zeros_stand_for_none() -> None:
    rows, none = torch.randn(5, WIDTH), torch.zeros(3, WIDTH)
    (moments,) = Regulariser().measure(torch.cat([rows, none]), rows[:2])
    assert float(moments.count) == 7
    torch.testing.assert_close(moments.total, rows.sum(0) + rows[:2].sum(0))


def test_one_with_parameters_is_refused_by_zero_3() -> None:
    learns = Regulariser()
    learns.weight = torch.nn.Parameter(torch.ones(1))
    model = torch.nn.ModuleDict({"emcl": learns})
    _check_regularisers(model, 2)
    with pytest.raises(UserError, match=r"emcl \(Regulariser\) has parameters, which ZeRO-3 does not gather"):
        _check_regularisers(model, 3)


class Centred(Regulariser):
    fits_directions = True

    def correction(self, measure, *, all_reduce=None):  # type: ignore[no-untyped-def]
        self.seen = [float(moments.count) for moments in measure()]


def test_evaluations_take_a_transductive_one_tile_by_tile_and_directions_a_modality_apart() -> None:
    text, frames, mask = torch.randn(5, WIDTH), torch.randn(7, 3, WIDTH), torch.ones(7, 3, dtype=torch.bool)
    scores = similarity_on_ranks(text, frames, mask, 4, ALONE, temperature=3.0, regulariser=Tiles())
    assert scores.tolist() == [[4.0] * 4 + [3.0] * 3] * 5
    one_by_one = similarity_by_tile(text, frames, mask, 2, temperature=3.0, regulariser=Looks().eval(), at_once=3)
    assert one_by_one.shape == (5, 7)  # what may look at values is not batched, whatever a GPU would like
    assert Tiles().protocol(4) == "Tiles in tiles of 4 x 4"
    similarity(text, frames, mask, temperature=3.0, regulariser=(layer := Centred()))
    assert layer.seen == [35.0, 5.0]  # pooled rows, and texts
    assert isinstance(layer.measure(text)[0], Moments)


def test_optimisers_and_schedules_of_our_own(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)

    def rates(schedule: str) -> list[float]:
        config = OptimConfig(lr=1.0, schedule=schedule, optimizer="sgd", optimizer_options={"momentum": "0.5"})
        optimizer = build_optimizer(model, config, offload=False, fused=False)
        assert isinstance(optimizer, torch.optim.SGD)
        assert [group["momentum"] for group in optimizer.param_groups] == [0.5, 0.5]
        steps, values = build_schedule(optimizer, config, 20), []
        for _ in range(20):
            values.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            steps.step()
        return values

    assert rates("constant") == [0.0, 0.5, *[1.0] * 18]
    assert rates("linear")[2:] == pytest.approx([1 - step / 18 for step in range(18)])
    assert rates("cosine")[11] == pytest.approx(0.5)
    offloading = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "offload.json").write_text(json.dumps(offloading))
    config = resolve(["retrieval"], overrides=[f"deepspeed={tmp_path}/offload.json", "optim.optimizer=sgd"])
    with pytest.raises(UserError, match=r"which optim\.optimizer=sgd has no form for: take adamw"):
        deepspeed_settings(config, 1)


def test_an_index_knows_its_model_though_there_are_more_settings_now() -> None:
    of_before = from_dict([{"tasks": {"retrieval": {}}}])
    assert hashlib.sha256(fingerprint_text(of_before).encode()).hexdigest()[:16] == DEFAULTS, "indexes are orphaned"
    usual = resolve(["retrieval"], overrides=[f"model.name={TINY}"])
    assert "schedule" in to_yaml(usual) and "schedule" not in fingerprint_text(usual)
    other = resolve(["retrieval"], overrides=[f"model.name={TINY}", "optim.schedule=linear"])
    assert fingerprint_text(other) != fingerprint_text(usual)
    assert "rescoring" in to_yaml(usual) and "rescoring" not in fingerprint_text(usual)
    of_task = fingerprint_text(resolve(["captioning"], overrides=["tasks.captioning.max_tokens=40"]))
    assert "    words: 40\n" in of_task and "max_tokens" not in of_task


def test_the_tables_name_what_there_is() -> None:
    bases = ((BACKBONES, Backbone), (REGULARISERS, Regulariser), (OPTIMIZERS, OptimizerKind), (RESCORINGS, Rescoring))
    for table, base in bases:
        assert all(issubclass(table.load_class(name, base), base) for name in table.names())
    assert all(callable(SCHEDULES.load(name)) for name in SCHEDULES.names())
