"""The published code's training runs of `shared/golden`, taken step by step by our own Trainer on their batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from emcl.tasks.msrvtt_qa_questions import Questions

from conftest import small
from emcl import distributed
from emcl.config import resolve
from emcl.data.batch import Batch, videos_of
from emcl.data.captions import Captions
from emcl.distributed import Ranks
from emcl.model.open_clip_backbone import OPENAI_KEYS
from emcl.run_folder import RunFolder
from emcl.tracking import Tracker
from emcl.train import published_checkpoint
from emcl.train.initialization import open_splits
from emcl.train.loop import Step, Trainer

Golden = dict[str, np.ndarray]
PUBLISHED = ["optim.optimizer=bert_adam", "optim.schedule=warmup_cosine", "optim.decay=all_but_biases"]
"""The published recurrence, schedule and decay."""
MATRICES = (".attn.", ".mlp.", "conv1", "image.trunk.proj", "text_projection")
"""Of the towers, by parts of their names."""
WITHOUT_EFFECT = ("head/v_w.2.bias", "head/t_w.2.bias")
"""Biases of a softmax, which ours has not."""
FROZEN = {
    "retrieval": ["image.trunk.conv1"],
    "msrvtt_qa": [
        "image.trunk.conv1", "image.trunk.class_embedding", "image.trunk.positional_embedding", "image.trunk.ln_pre",
        "text.trunk.token_embedding", "text.trunk.positional_embedding",
    ],
}  # fmt: skip


def golden_settings(golden: Golden) -> dict[str, Any]:
    return json.loads(str(golden["settings"]))


def write_checkpoint(golden: Golden, folder: Path) -> list[str]:
    """The weights that a run begins with, as OpenAI saves them, and their architecture; settings that name both."""
    facts = golden_settings(golden)
    architecture = {
        "embed_dim": facts["embed"],
        "vision_cfg": {
            "image_size": facts["image"], "patch_size": facts["patch"], "width": facts["width"],
            "head_width": facts["width"] // facts["heads"], "layers": facts["vision_layers"],
        },
        "text_cfg": {
            "context_length": len(golden["weights/positional_embedding"]), "vocab_size": facts["vocabulary"],
            "width": facts["width"], "heads": facts["heads"], "layers": facts["text_layers"],
        },
    }  # fmt: skip
    (folder / "clip.json").write_text(json.dumps(architecture))
    weights = {name.removeprefix("weights/"): torch.from_numpy(golden[name]) for name in golden if "weights/" in name}
    torch.save({**weights, **dict.fromkeys(OPENAI_KEYS, torch.tensor(0))}, folder / "clip.pt")
    return [f"model.name={folder}/clip.json", f"model.pretrained={folder}/clip.pt", f"data.image_size={facts['image']}"]


def training_settings(golden: Golden, task: str) -> list[str]:
    """The run's own settings, by our names."""
    facts = golden_settings(golden)
    own = []
    if task == "msrvtt_qa":
        answers = ",".join(f"a{number}" for number in range(facts["labels"]))
        own = [
            "tasks.msrvtt_qa.head=reference", "tasks.msrvtt_qa.fusion=concat",
            f"tasks.msrvtt_qa.dropout={facts['dropout']}",
            f"tasks.msrvtt_qa.contrastive_weight={facts['contrastive_weight']}", "model.temporal_projection=true",
            f"tasks.msrvtt_qa.answers=[{answers}]",
        ]  # fmt: skip
    return [
        *own,
        *PUBLISHED, f"optim.lr={facts['lr_new']}", f"optim.backbone_lr={facts['lr_clip']}",
        f"optim.logit_scale_lr={facts['lr_clip']}", f"optim.weight_decay={facts['weight_decay']}",
        f"optim.betas={facts['betas']}", f"optim.eps={facts['eps']}", f"optim.grad_clip={facts['grad_clip']}",
        f"optim.warmup={facts['warmup']}", f"optim.max_steps={facts['total_steps']}", "optim.epochs=100",
        f"model.frozen={FROZEN[task]}", f"model.temporal_layers={facts['temporal_layers']}",
        f"data.frames={facts['frames']}", f"data.max_tokens={facts['words']}", f"data.batch_size={facts['batch']}",
        f"emcl.bases={facts['k']}", f"emcl.iterations={facts['iterations']}", f"emcl.beta={facts['beta']}",
        f"emcl.temperature={facts['temperature']}", f"emcl.momentum={facts['momentum']}",
    ]  # fmt: skip


class GoldenTrainer(Trainer):
    """Our Trainer, fed with the published run's batches, which notes what each step did."""

    golden: Golden
    task: str

    def begin(self, golden: Golden, task: str) -> None:
        self.golden, self.task = golden, task
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.mu: list[torch.Tensor] = []
        self.model.tasks[task].emcl.mu.copy_(torch.from_numpy(golden["mu0"])[0])
        if any(name.startswith("head/") for name in golden):
            self.take_heads()
        if self.engine.zero_optimization_stage() == 0:  # where DeepSpeed does not keep the norm
            clip = self.engine.clip_fp32_gradients

            def noted() -> None:
                own = [weight.grad.float().norm() for weight in self.model.parameters() if weight.grad is not None]
                self.norms.append(float(torch.stack(own).norm()))
                clip()

            self.engine.clip_fp32_gradients = noted

    @torch.no_grad()
    def take_heads(self) -> None:
        """The published run's new layers. Its towers' matrices had been in fp16 once, as OpenAI's files have them."""
        weights = dict(self.model.named_parameters())
        for name, weight in weights.items():
            if ".trunk." in name and any(part in name for part in MATRICES):
                weight.copy_(weight.half().float())
        for name, value in self.golden.items():
            if name.startswith("head/") and name not in WITHOUT_EFFECT:
                weights[our_name(name.removeprefix("head/"), self.task)].copy_(torch.from_numpy(value))

    def _steps(self, start: int) -> Iterator[Step]:
        self.loader = SimpleNamespace(restarts=0)
        for step in range(start, golden_settings(self.golden)["steps"]):
            yield [self.batch(step)], 0.0

    def batch(self, step: int) -> Batch:
        """This rank's share."""
        part = {name: self.golden[f"batch{step}/{name}"] for name in ("text_ids", "frames", "video_mask")}
        assert part["video_mask"].all(), "the golden runs have no absent frame"
        mine = self.ranks.share(len(part["frames"]))
        clips = [clip.transpose(0, 2, 3, 1) for clip in part["frames"][mine]]
        inputs = self.texts(torch.from_numpy(part["text_ids"][mine]), step, mine)
        return Batch(
            ids=[""] * len(clips), rows=[0] * len(clips), videos=videos_of(clips, len(clips[0])),
            tasks={self.task: inputs},
        )  # fmt: skip

    def texts(self, ids_BL: torch.Tensor, step: int, mine: slice) -> Captions | Questions:
        """The task's input: a caption of each video, or a question with its answer."""
        each, present = torch.arange(len(ids_BL)), torch.ones(len(ids_BL), dtype=torch.bool)
        if self.task == "retrieval":
            return Captions(ids_BL, present)
        labels = torch.from_numpy(self.golden[f"batch{step}/labels"][mine])
        return Questions(ids_BL, each, each, labels, each, present, [""] * len(ids_BL))

    def _step(self, micro_batches: list[Batch]) -> dict[str, torch.Tensor]:
        losses = super()._step(micro_batches)
        total = torch.stack([value.double() for value in losses.values()]).sum()
        self.losses.append(float(self.ranks.sum(total) / self.ranks.world_size))
        if self.engine.zero_optimization_stage():
            self.norms.append(float(self.engine.get_global_grad_norm()))
        self.mu.append(self.model.tasks[self.task].emcl.mu.clone())
        return losses


def golden_run(
    ranks: Ranks, golden_file: Path, shards: Path, folder: Path, settings: list[str], task: str
) -> dict[str, Any]:
    """What our Trainer makes of a golden run: losses, gradient norms, mu, weights, and batch 0 in evaluation."""
    distributed.quiet_start()
    distributed.compile_nothing()
    if ranks.world_size == 1:
        ranks = distributed.start()
    golden = dict(np.load(golden_file))
    folder = folder / f"rank{ranks.rank}of{ranks.world_size}"
    folder.mkdir(parents=True, exist_ok=True)
    own = [*write_checkpoint(golden, folder), *training_settings(golden, task), "data.val=null", "data.test=null"]
    config = resolve([task], "sample", [*small(shards), *own, *settings])
    trainer = GoldenTrainer(*open_splits(config), ranks, torch.device("cpu"), RunFolder(folder / "run"))
    trainer.begin(golden, task)
    begun = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train(Tracker())
    return {
        "losses": trainer.losses, "norms": trainer.norms, "mu": torch.stack(trainer.mu), "begun": begun,
        "weights": {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()},
        **evaluated(trainer),
    }  # fmt: skip


@torch.no_grad()
def evaluated(trainer: GoldenTrainer) -> dict[str, torch.Tensor]:
    """Text, frames and similarity of batch 0 in evaluation, of the whole batch on one rank."""
    if trainer.ranks.world_size > 1:
        return {}
    batch, model = trainer.batch(0), trainer.model.eval()
    head: Any = model.tasks[trainer.task]
    if trainer.task == "msrvtt_qa":
        asked = batch.tasks[trainer.task]
        return {"logits": head.answers_of(model.backbone, model.encode(batch), asked.ids_UL, asked.video_N)}
    encoded, text = model.encode(batch), model.backbone.encode_text(batch.tasks[trainer.task].text)
    similarity = head.similarity(text, encoded.frames_BTD, encoded.video_mask_BT, trainer.ranks, head.emcl)
    return {"text": text, "frames": encoded.frames_BTD, "similarity": similarity}


def our_name(published: str, task: str) -> str:
    """Our name of a weight that the published code calls `published`."""
    of_retrieval = published_checkpoint.our_name(published)
    if of_retrieval is not None:
        return of_retrieval.replace("tasks.retrieval.", f"tasks.{task}.")
    for theirs, ours in {
        "mean_proj.": "backbone.temporal.projection.",
        "v_w.": f"tasks.{task}.head.video_pooling.score.",
        "t_w.": f"tasks.{task}.head.question_pooling.score.",
        "v_proj.": f"tasks.{task}.head.video_projection.",
        "t_proj.": f"tasks.{task}.head.question_projection.",
        "classifier.0.": f"tasks.{task}.head.classifier.1.",
        "classifier.2.": f"tasks.{task}.head.classifier.3.",
    }.items():
        if published.startswith(theirs):
            return ours + published.removeprefix(theirs)
    raise KeyError(published)
