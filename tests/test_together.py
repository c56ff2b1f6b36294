"""Several tasks from one encoding: the same losses on any number of ranks, whatever samples each of them has."""

from __future__ import annotations

import dataclasses
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import launch, small
from emcl.config import Config, resolve
from emcl.data.batch import number_of
from emcl.data.captions import Tokens
from emcl.data.loader import Collate, Loaded
from emcl.data.sampler import Draw
from emcl.data.samples import Sample
from emcl.distributed import ALONE, Ranks
from emcl.model.backbone import tokenizer_of
from emcl.multitask import VideoLanguageModel, collators, total_loss
from emcl.registry import task_class, task_entries
from ranks import run_on_ranks

TASKS = ["retrieval", "captioning", "msrvtt_qa"]
TINY = str(Path(__file__).parent / "tiny_clip.json")
SETTINGS = [
    f"model.name={TINY}", "data.image_size=32", "data.frames=3", "data.max_tokens=12", "data.batch_size=8",
    "emcl.bases=4", "tasks.captioning.dropout=0", "tasks.msrvtt_qa.dropout=0", "tasks.msrvtt_qa.questions_per_video=2",
]  # fmt: skip
CAPTIONED = {"captions": ["a red circle moves left", "it goes left"]}
ASKED = {"qa": [{"question": "what moves?", "answer": "circle"}, {"question": "what colour?", "answer": "red"}]}
COVERAGES = {
    "all have all": [{**CAPTIONED, **ASKED}] * 8,
    "mixed": [{**CAPTIONED, **ASKED}, CAPTIONED, ASKED, {}, CAPTIONED, {}, {**CAPTIONED, **ASKED}, CAPTIONED],
    "one rank has captions, the other questions": [CAPTIONED] * 4 + [ASKED] * 4,
    "none has anything": [{}] * 8,
}


def configured(samples: list[Sample], *more: str) -> Config:
    config = resolve(TASKS, overrides=[*SETTINGS, *more])
    known = [Sample(id="x", **CAPTIONED, **ASKED)]  # type: ignore[arg-type]
    tasks = {name: task_class(name).learn_settings(item, config, known) for name, item in config.tasks.items()}
    return dataclasses.replace(config, tasks=tasks)


def _joint(ranks: Ranks, coverage: str, more: list[str]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    samples = [Sample(id=str(number), **facts) for number, facts in enumerate(COVERAGES[coverage])]  # type: ignore[arg-type]
    config = configured(samples, *more)
    texts = Tokens(tokenizer_of(config))
    collate_by_task = collators(config, texts, training=True)
    own_rows = range(8)[ranks.share(8)]
    items = []
    for row in own_rows:
        frames = np.random.default_rng(row).integers(0, 256, (1 + row % 3, 32, 32, 3), dtype=np.uint8)
        items.append(Loaded(Draw(row, None, row), samples[row], frames))
    torch.manual_seed(0)
    model = VideoLanguageModel(config, ranks=ranks)
    losses = model(batch=Collate(collate_by_task, frames=3)(items))
    total_loss(losses).backward()
    whole = {name: float(ranks.sum(loss.detach()) / ranks.world_size) for name, loss in losses.items()}
    gradients = {
        name: ranks.sum(torch.zeros_like(weight) if weight.grad is None else weight.grad) / ranks.world_size
        for name, weight in model.named_parameters()
    }
    return whole, gradients


@pytest.mark.parametrize("coverage", COVERAGES)
@pytest.mark.parametrize("more", [[], ["emcl.variant=compact", "emcl.beta=1", "uncertainty_weights=true"]])
def test_losses_and_gradients_on_two_ranks_are_those_of_one(coverage: str, more: list[str], tmp_path: Path) -> None:
    # two iterations of EM from a random start on 16 rows: directions of nearly equal variance turn with rounding
    exact = 1e-4 if more else 1e-5
    ((losses, gradients),) = run_on_ranks(_joint, 1, tmp_path, coverage, more)
    for other_losses, other_gradients in run_on_ranks(_joint, 2, tmp_path, coverage, more):
        assert other_losses == pytest.approx(losses, rel=exact, abs=1e-7)
        for name, gradient in gradients.items():
            if name.endswith("in_proj_bias"):  # the key bias has a gradient of exactly zero, which only rounding fills
                continue
            difference = (other_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-5)
            assert difference < 20 * exact, name
    if coverage == "none has anything":
        assert set(losses.values()) == {0.0}
        assert all(float(gradient.abs().sum()) == 0 for gradient in gradients.values())


def test_of_answers_the_contrastive_term_alone_takes_a_slice_of_the_gradient(tmp_path: Path) -> None:
    """`optim.gather_with_grad=false` halves its share in all weights before it on two ranks, but not in its scale."""
    alone = ["tasks.retrieval.weight=0", "tasks.captioning.weight=0"]

    def gradients(*more: str) -> dict[str, torch.Tensor]:
        return run_on_ranks(_joint, 2, tmp_path, "all have all", [*alone, *more])[0][1]

    answers, whole = gradients("tasks.msrvtt_qa.contrastive_weight=0"), gradients()
    for name, gradient in gradients("optim.gather_with_grad=false").items():
        share = 1.0 if name.endswith("logit_scale") else 0.5
        wanted = answers[name] + share * (whole[name] - answers[name])
        assert (gradient - wanted).norm() / whole[name].norm().clamp_min(1e-5) < 1e-4, name
    name = "tasks.msrvtt_qa.head.video_projection.weight"
    assert (whole[name] - answers[name]).norm() > 1e-3


@pytest.mark.parametrize("more", [["emcl.enabled=false"], [], ["emcl.variant=compact", "emcl.beta=1"]])
def test_a_sample_without_captions_is_nobodys_negative_and_no_row_of_em(more: list[str]) -> None:
    """The loss of the samples that have captions is that of a batch of those alone."""
    with_others, _ = _joint(ALONE, "mixed", more)
    only = [facts for facts in COVERAGES["mixed"] if "captions" in facts]
    kept = [row for row, facts in enumerate(COVERAGES["mixed"]) if "captions" in facts]
    samples = [Sample(id=str(row), **facts) for row, facts in zip(kept, only, strict=True)]  # type: ignore[arg-type]
    config = configured(samples, *more)
    texts = Tokens(tokenizer_of(config))
    collate_by_task = collators(config, texts, training=True)
    items = [
        Loaded(
            Draw(row, None, row),
            sample,
            np.random.default_rng(row).integers(0, 256, (1 + row % 3, 32, 32, 3), np.uint8),
        )
        for row, sample in zip(kept, samples, strict=True)
    ]
    torch.manual_seed(0)
    alone = VideoLanguageModel(config)(batch=Collate(collate_by_task, frames=3)(items))
    assert with_others["retrieval/contrastive"] == pytest.approx(
        float(alone["retrieval/contrastive"].detach()), rel=1e-5
    )


@pytest.mark.parametrize("task", ["retrieval", "msrvtt_qa"])
def test_a_video_that_is_drawn_twice_is_no_negative_of_itself(task: str) -> None:
    """The loss is that of a batch whose second drawing is of the same number; one of another number would count."""
    sample = [Sample(id=name, source="set", **CAPTIONED, **ASKED) for name in ("a", "b", "a")]  # type: ignore[arg-type]
    config = configured(sample, "emcl.enabled=false")
    collate_by_task = collators(config, Tokens(tokenizer_of(config)), training=True)
    rng = np.random.default_rng(0)
    shown = [rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8) for _ in range(2)]
    items = [Loaded(Draw(row, 0, row), one, shown[row % 2]) for row, one in enumerate(sample)]
    batch = Collate(collate_by_task, frames=3)(items)
    assert batch.video_B is not None
    assert batch.video_B[0] == batch.video_B[2] != batch.video_B[1]
    torch.manual_seed(0)
    model = VideoLanguageModel(config)
    masked = model(batch=batch)[f"{task}/contrastive"]
    apart = model(batch=dataclasses.replace(batch, video_B=torch.arange(3)))[f"{task}/contrastive"]
    assert float(masked.detach()) < 0.9 * float(apart.detach())


def test_one_video_has_one_number_in_every_process_and_set() -> None:
    numbers = [number_of(Sample(id=name, source=source), 0) for name, source in (("a", "s"), ("a", "t"), ("b", "s"))]
    assert len(set(numbers)) == 3
    assert number_of(Sample(id="a", source="s", captions=["x"], split="val"), 7) == numbers[0] == 7597875714891834536


@pytest.mark.parametrize("source", ["", "folder"])
def test_two_sets_of_own_videos_may_have_files_of_one_name(source: str) -> None:
    sample = Sample(id="0001", source=source)
    assert number_of(sample, 3) == number_of(sample, 3) != number_of(sample, 4)


def test_learned_weights_rise_for_the_task_whose_loss_is_small() -> None:
    from emcl.multitask import Uncertainty

    weights = Uncertainty(["a", "b"])
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = sum(
            total_loss(weights(name, {"loss": torch.tensor(value)}, ALONE)) for name, value in (("a", 0.5), ("b", 4.0))
        )
        loss.backward()
        optimizer.step()
    assert weights.log_variance.exp().tolist() == pytest.approx([0.5, 4.0], rel=1e-3)  # the optimum: s = log(loss)


@pytest.fixture(scope="module")
def uneven_shards(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small sample set, of which the second training shard has neither captions nor questions."""
    folder = tmp_path_factory.mktemp("uneven")
    for path in sample_shards.glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    target = folder / "train-000001.tar"
    import io

    with tarfile.open(sample_shards / target.name) as old, tarfile.open(target, "w") as new:
        for member in old:
            stream = old.extractfile(member)
            assert stream is not None
            content = stream.read()
            if member.name.endswith(".json"):
                content = Sample(id=Sample.from_json(content, "").id).to_json()
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.xdist_group("zero")
@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_of_different_coverage_train_and_score_all_tasks(stage: int, uneven_shards: Path, tmp_path: Path) -> None:
    done = launch(
        "--task", "all", *small(uneven_shards), "data.batch_size=4", f"deepspeed=deepspeed/zero{stage}.json",
        "name=run", "data.shuffle_buffer=1", "optim.max_steps=5", "evaluate.every_epochs=9",
        "tasks.captioning.generation.num_beams=2", "tasks.captioning.generation.max_new_tokens=8",
        cwd=tmp_path, ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in task_entries():
        assert (tmp_path / f"runs/run/{name}-test.txt").is_file()
    import json

    import emcl

    model = emcl.load(tmp_path / "runs/run")
    clip = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    one, two = model.caption([clip, clip[::-1]])
    assert isinstance(one, str) and isinstance(two, str)
    answers = model.answer(clip, "what moves?", top=3)
    assert len(answers) == 3 and 0 < answers[2][1] <= answers[0][1] < 1
    captions = json.loads((tmp_path / "runs/run/captions-test.json").read_text())
    assert len({item["image_id"] for item in captions}) == len(captions) == 12  # each test video exactly once


@pytest.mark.xdist_group("zero")
def test_a_task_alone_starts_from_a_run_of_others(uneven_shards: Path, tmp_path: Path) -> None:
    settings = [*small(uneven_shards), "data.val=null", "data.test=null", "optim.max_steps=2"]
    first = launch("--task", "retrieval,msrvtt_qa", *settings, "name=first", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    # steps too small for fp32
    second = launch(
        "--task", "msrvtt_qa,captioning", *settings, "name=second", "--init", "runs/first", "optim.lr=1e-300",
        "optim.backbone_lr=0", cwd=tmp_path,
    )  # fmt: skip
    assert second.returncode == 0, second.stdout + second.stderr
    assert "tasks.msrvtt_qa" in second.stdout and "new: tasks.captioning" in second.stdout
    from safetensors.torch import load_file

    before, after = (load_file(tmp_path / f"runs/{name}/best/model.safetensors") for name in ("first", "second"))
    shared = [name for name in before if name in after and "emcl" not in name]
    assert any(name.startswith("backbone") for name in shared) and any("msrvtt_qa" in name for name in shared)
    assert all(torch.equal(before[name], after[name]) for name in shared)
    wrong = launch("--task", "retrieval", *settings, "--init", "runs/none", cwd=tmp_path)
    assert wrong.returncode == 2 and "no such directory" in wrong.stderr
