"""A plain CLIP of open_clip's as a model of ours, for zero-shot retrieval: a video is the mean of its frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from emcl.config import Config, resolve
from emcl.errors import UserError
from emcl.model.architecture_limits import CONTEXT, SIDE, check_limits
from emcl.model.open_clip_backbone import model_json
from emcl.multitask import VideoLanguageModel
from emcl.train.initialization import as_pretrained
from emcl.train.published_checkpoint import TASK, created_run, write_imported


def plain_clip(name: str, weights: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a plain CLIP, which has not learnt from videos and has no EMCL.

    Raises:
        UserError: no such file or architecture.
    """
    if not weights.is_file():
        raise UserError(f"{weights}: no such file; give a checkpoint of {name}")
    settings = model_json(name)
    size = settings["vision_cfg"].get("image_size", SIDE)
    words = settings["text_cfg"].get("context_length", CONTEXT)
    own = [
        f"model.name={name}", f"model.pretrained={weights}", "model.temporal=mean", "emcl.enabled=false",
        f"data.image_size={size}", f"data.max_tokens={words}", "data.frames=12",
        "tasks.retrieval.pooling_temperature=1e6",  # of the pooling by text: so high that it is the mean
    ]  # fmt: skip
    return as_pretrained(resolve([TASK], overrides=[*own, *overrides]))


def import_plain_clip(file: Path, out: Path, name: str, overrides: Sequence[str] = ()) -> list[str]:
    """Writes a plain CLIP as a finished run to the folder `out`; returns lines that say what it found.

    Frames are resized by PIL, as open_clip does. Arguments and errors as `import_checkpoint`.
    """
    sigmoid = ["tasks.retrieval.loss=sigmoid"] if "init_logit_bias" in model_json(name) else []  # it keeps the bias
    config = plain_clip(name, file, ["data.resize=pil", *sigmoid, *overrides])
    check_limits(config)
    model = VideoLanguageModel(config)
    with created_run(out) as folder:
        # nothing is looked up from another folder
        tokenizer = config.model.tokenizer and _whole(config.model.tokenizer)
        kept = dataclasses.replace(config.model, pretrained=None, name=_whole(name), tokenizer=tokenizer)
        config = dataclasses.replace(config, name=folder.path.resolve().name, model=kept)
        write_imported(folder, model, config, file)
    data = config.data
    return [
        f"{folder}: {name}, zero-shot; {data.frames} frames of {data.image_size} pixels, {data.max_tokens} tokens",
        f"score it by emcl evaluate {folder} data.test=SHARDS; emcl.load('{folder.best}') opens it",
    ]


def _whole(path: str) -> str:
    """Of what is on this disk the whole path; anything else as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path
