"""The shipped recipes: each resolves, has the published hyper-parameters, and builds its model on the meta device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import launch
from emcl.config import resolve
from emcl.resources import configs_folder, find_file
from emcl.train import plan as planning
from emcl.train.fake_cuda import NoFakeCudaError
from emcl.train.plan import Plan, bucket_bytes, describe_plan, plan, state_gib

# EMCL.md's table: global batch, epochs, words, frames
PUBLISHED = {
    "msrvtt_retrieval": (128, 5, 32, 12),
    "msrvtt_7k_retrieval": (128, 5, 32, 12),
    "lsmdc_retrieval": (128, 5, 32, 12),
    "msvd_retrieval": (128, 20, 32, 12),
    "activitynet_retrieval": (128, 5, 64, 64),
    "didemo_retrieval": (128, 5, 64, 64),
    "vatex_retrieval": (128, 5, 32, 12),
    "msrvtt_captioning": (128, 5, 32, 12),
    "msrvtt_qa": (32, 5, 32, 12),
    "pretrain_all": (1024, 20, 32, 12),
}
GROUPS = {"clip_decay": 1e-6, "clip_no_decay": 1e-6, "new_decay": 1e-4, "new_no_decay": 1e-4}
UNCHANGED = ("activitynet_retrieval", "didemo_retrieval", "msrvtt_qa")
"""Where frames are not augmented."""
AS_PUBLISHED = (
    "msrvtt_retrieval",
    "lsmdc_retrieval",
    "msvd_retrieval",
    "activitynet_retrieval",
    "didemo_retrieval",
    "msrvtt_qa",
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_resolves_and_is_counted(name: str, tmp_path: Path) -> None:
    config = resolve(None, name, [f"data.root={tmp_path}/none"])
    data, optim = config.data, config.optim
    assert (data.batch_size, optim.epochs, data.max_tokens, data.frames) == PUBLISHED[name]
    augment = "none" if name in UNCHANGED else "rand-m7-n4-mstd0.5-inc1"
    assert (data.fps, data.image_size, data.augment) == (1.0, 224, augment)
    assert (optim.weight_decay, optim.betas, optim.eps, optim.grad_clip, optim.warmup) == (
        0.2,
        [0.9, 0.98],
        1e-6,
        1,
        0.1,
    )
    layer = config.emcl
    of_task = (16, 5, 1.0) if name == "msrvtt_qa" else (32, 9, 3.0)
    assert (layer.bases, layer.iterations, layer.beta) == of_task
    assert (layer.variant, layer.temperature, layer.momentum) == ("reference", 1.0, 0.9)
    assert "zero_optimization" in json.loads(find_file(config.deepspeed, "deepspeed").read_text())
    planned, _ = plan(config)
    assert {group: rate for group, (_, rate) in planned.groups.items()} == GROUPS
    assert planned.trained == planned.parameters == sum(count for count, _ in planned.groups.values())
    millions = 149 if name == "msrvtt_qa" else 151  # ViT-B/16, ViT-B/32
    assert millions <= (planned.groups["clip_decay"][0] + planned.groups["clip_no_decay"][0]) / 1e6 < millions + 1
    assert planned.steps is None
    assert len(planned.missing) >= 1 and all(str(tmp_path) in item for item in planned.missing)


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_a_published_recipe_trains_as_the_published_code(name: str, tmp_path: Path) -> None:
    config = resolve(None, f"published/{name}", [f"data.root={tmp_path}/none"])
    ours = resolve(None, name, [f"data.root={tmp_path}/none"])
    optim, data, qa = config.optim, config.data, name == "msrvtt_qa"
    assert (config.precision, config.deepspeed) == ("clip_fp16", "deepspeed/zero0.json")
    assert (optim.optimizer, optim.schedule, optim.decay) == ("bert_adam", "warmup_cosine", "all_but_biases")
    assert (optim.lr, optim.backbone_lr, optim.logit_scale_lr, optim.gather_with_grad) == (1e-4, 1e-7, 1e-7, False)
    assert (config.evaluate.select, config.evaluate.every_steps, data.val) == ("test", None if qa else 150, None)
    assert data.train.endswith("/train-*.tar") and data.pairs == ("question" if qa else "caption")
    same = ("frames", "fps", "max_tokens", "image_size", "augment", "batch_size")
    assert [getattr(data, key) for key in same] == [getattr(ours.data, key) for key in same]
    assert (optim.epochs, optim.betas, optim.eps, optim.warmup) == (ours.optim.epochs, [0.9, 0.98], 1e-6, 0.1)
    assert config.emcl == replace(ours.emcl, factors=0)  # what was found since
    planned, _ = plan(config)
    rates = {"new_decay": 1e-4, "new_no_decay": 1e-4, "clip_decay": 1e-7, "clip_no_decay": 1e-7}
    assert {group: rate for group, (_, rate) in planned.groups.items()} == {**rates, "logit_scale_decay": 1e-7}
    frozen = planned.parameters - planned.trained
    below = 25.3e6 + 151_296 + 2 * 768 + 768 + 77 * 512 if qa else 0  # tokens and positions
    assert frozen == pytest.approx((16 if qa else 32) ** 2 * 3 * 768 + below, rel=2e-3)
    if qa:
        answering = config.tasks["msrvtt_qa"]
        assert (config.model.name, config.model.temporal_projection, answering.head) == ("ViT-B-16", True, "reference")
        assert (answering.answers_kept, answering.answers_counted, answering.dropout) == (1000, 1500, 0.1)


def test_our_recipes_choose_their_model_apart_from_the_test_set(tmp_path: Path) -> None:
    for name in PUBLISHED:
        config = resolve(None, name, [f"data.root={tmp_path}/none"])
        assert config.evaluate.select == "val"
        if name != "pretrain_all":
            assert config.data.val and config.data.val != config.data.test
            assert "val-" in config.data.val or config.data.val.endswith("train-000000.tar")  # then not trained on


def test_every_recipe_says_how_its_shards_are_made_and_how_it_is_started() -> None:
    of_towers = ("msrvtt_pe_core", "msrvtt_siglip2", "msrvtt_mobileclip2")
    for name in (*PUBLISHED, *of_towers, *(f"published/{name}" for name in AS_PUBLISHED)):
        head = (configs_folder() / "recipe" / f"{name}.yaml").read_text().split("include:")[0]
        assert "emcl prepare" in head and f"--recipe {name} data.root=" in head and "GPUs of" in head


def test_activations_are_those_of_the_towers_layers() -> None:
    """ViT-B/32 keeps some 17 numbers of each token's width and layer, in two bytes each, and grows with the frames."""
    config = resolve(None, "msrvtt_retrieval")
    planned, _ = plan(config)
    image = 12 * 12 * 50 * 768 * 17 * 2  # frames, layers, tokens, width
    text = 12 * 32 * 512 * 17 * 2
    assert planned.activations == pytest.approx(image + text, rel=0.3)
    twice, _ = plan(resolve(None, "msrvtt_retrieval", ["data.frames=24"]))
    assert 1.8 < twice.activations / planned.activations < 2
    frozen, _ = plan(resolve(None, "msrvtt_retrieval", ["model.frozen=[image,text]"]))
    assert frozen.activations < 0.1 * planned.activations


def test_zero_shares_what_its_stages_say() -> None:
    whole = Plan(parameters=10**9, trained=10**9, groups={}, missing=[])
    gib = 10**9 / 2**30
    config = resolve(["retrieval"], overrides=["precision=bf16"])
    for stage, bytes_ in ((0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)):
        assert state_gib(whole, config, stage, 8) == pytest.approx(bytes_ * gib)
    momentum = resolve(["retrieval"], overrides=["optim.optimizer=sgd"])  # fp32: weights, gradients, one number more
    assert state_gib(whole, momentum, 0, 8) == pytest.approx(12 * gib)


def test_buckets_are_those_that_deepspeed_allocates() -> None:
    assert bucket_bytes({"stage": 0}, 10**8, 2) == 0
    assert bucket_bytes({"stage": 1}, 10**8, 2) == 2 * 5 * 10**8  # all of it, however small the model
    assert bucket_bytes({"stage": 2, "reduce_bucket_size": 10**6, "overlap_comm": True}, 10**8, 2) == 4 * 10**6
    assert bucket_bytes({"stage": 1, "contiguous_gradients": False}, 10**8, 2) == 2 * 10**8
    gathered = {"stage": 3, "reduce_bucket_size": 10**6, "stage3_max_live_parameters": 10**7}
    assert bucket_bytes(gathered, 10**8, 4) == 4 * (10**6 + 10**7)
    assert bucket_bytes({**gathered, "stage3_max_live_parameters": 10**9}, 10**8, 4) == 4 * (10**6 + 10**8)


def test_where_the_step_cannot_be_planned_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise NoFakeCudaError("this torch is built without CUDA")

    monkeypatch.setattr(planning, "in_clean_process", cannot)
    text = describe_plan(resolve(None, "msrvtt_retrieval"))
    assert "activations not planned: this torch is built without CUDA; estimated from the towers alone" in text
    assert "activations (videos a GPU and step)" in text


def test_steps_are_those_of_the_shards(sample_shards: Path) -> None:
    patterns = [f"data.{split}={sample_shards}/{split}-*.tar" for split in ("train", "val", "test")]
    config = resolve(None, "msrvtt_retrieval", [*patterns, "data.batch_size=8"])
    planned, _ = plan(config)
    assert (planned.samples, planned.test, planned.missing) == (24, 12, [])
    assert (planned.steps_per_epoch, planned.steps) == (24 * 4 // 8, 5 * 12)  # four captions each


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path: Path) -> None:
    done = launch("--recipe", "msrvtt_retrieval", f"data.root={tmp_path}/msrvtt", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "tasks: retrieval",
        "GiB a GPU",
        "image tower",
        f"missing: no shard matches {tmp_path}/msrvtt/test-*.tar",
    ):
        assert line in done.stdout
    assert not list(tmp_path.iterdir())
