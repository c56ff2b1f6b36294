"""Checkpoints of EMCL-Net's and CLIP4Clip's code as runs of ours: `emcl import FILE --out RUN`.

Both save a state dictionary of `clip.*` (a CLIP in OpenAI's layout), and with a temporal transformer
`frame_position_embeddings.weight` and `transformerClip.*`. Sizes follow from shapes. What training was set to does not
stand in them: it is the recipe's. Nor need `mu`, from which EM starts in every tile: after its iterations only the
signs matter (of 8 bases, another number of negative ones moved similarities by 0.0003).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from emcl.config import Config, resolve, to_yaml
from emcl.errors import UserError, first_line
from emcl.model.architecture_limits import check_limits
from emcl.model.open_clip_backbone import OPENAI_KEYS, model_json, read_checkpoint
from emcl.multitask import VideoLanguageModel
from emcl.run_folder import SAVED, RunFolder, TakenError
from emcl.train.export import different_shape, save_export

TASK = "retrieval"
HEAD_WIDTH = 64
"""Of every attention head in OpenAI's layout."""
POSITIONS, BLOCKS = "frame_position_embeddings.weight", "transformerClip.resblocks."
OF_CLIP4CLIP = ("emcl.enabled=false", "tasks.retrieval.pooling_temperature=1e6")
"""Without EMCL, and with the mean over frames."""
OTHERS = {
    "lstm_visual.": "a recurrent network over the frames",
    "cross.": "a transformer over words and frames",
    "similarity_dense.": "a transformer over words and frames",
    "classifier.": "a question answering head, whose answers it does not name",
}
"""First letters of what is not known here, and what it belongs to."""


def import_checkpoint(
    file: Path,
    out: Path,
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    clip4clip: bool = False,
    mu: Path | None = None,
) -> list[str]:
    """Writes `file` as a finished run to the folder `out`; returns lines that say what it found.

    Args:
        recipe: of the run's further settings, such as where its test split is.
        overrides: on top of them.
        clip4clip: whether CLIP4Clip's code saved it.
        mu: an .npy of EMCL's moving average, (K,) or (1, K).

    Raises:
        UserError: the file cannot be read or has another layout; `out` is a run already.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    state = _known(read_checkpoint(file)[0], file)
    average = _numbers(mu, _read_mu(mu)) if mu else None
    if average is None:
        average = next((_numbers(file, state[name]) for name in state if _is_mu(name)), None)
    architecture = _architecture(state, file)
    name = _name_of(architecture)
    with created_run(out) as folder:
        kept = folder.path.resolve() / "architecture.json"
        if name is None:
            kept.write_text(json.dumps(architecture, indent=1))
        found = _settings(state, architecture, average, name or str(kept), resolve([TASK], recipe))
        try:
            config = resolve([TASK], recipe, [*found, *(OF_CLIP4CLIP if clip4clip else ()), *overrides])
            config = dataclasses.replace(config, name=folder.path.resolve().name)
            model = _model(config, state, average, file)
        except BaseException:
            kept.unlink(missing_ok=True)  # the folder is empty then, and goes
            raise
        write_imported(folder, model, config, file)
    return _said(state, config, average, folder)


def write_imported(folder: RunFolder, model: VideoLanguageModel, config: Config, file: Path) -> None:
    """The model of `file` as the finished run that `folder` is of."""
    folder.write_start(to_yaml(config), {"imported": file.name})
    save_export(folder.best, model.state_dict(), config, {"imported": file.name, "tasks": {}})
    folder.note(SAVED, True)


def created_run(out: Path) -> RunFolder:
    """A new run's folder. Raises UserError: it is one already."""
    named = out if out.name not in ("", "..") else out.resolve()
    try:
        return RunFolder.create(named.parent, named.name, [TASK])
    except TakenError:
        raise UserError(f"--out {out} is a run already: give another folder") from None


def _model(config: Config, state: Mapping[str, Tensor], mu: Tensor | None, file: Path) -> VideoLanguageModel:
    """Raises UserError: settings that the weights do not fit."""
    check_limits(config)
    frames = len(state[POSITIONS]) if POSITIONS in state else config.data.frames
    if config.data.frames > frames:
        raise UserError(f"{file} has {frames} positions in time: give data.frames={frames} or less")
    model = VideoLanguageModel(config, load_weights=False)
    _fill(model, state, mu, file)
    return model


def our_name(published: str) -> str | None:
    """Our name of a weight, in a model whose only task is retrieval; None if there is none."""
    if published == "clip.logit_scale":
        return f"tasks.{TASK}.logit_scale"
    if published == POSITIONS:
        return "backbone.temporal.positions"
    for theirs, ours in {
        "clip.visual.": "backbone.image.trunk.",
        "clip.": "backbone.text.trunk.",
        BLOCKS: "backbone.temporal.blocks.",
    }.items():
        if published.startswith(theirs):
            return ours + published.removeprefix(theirs)
    return None


FRAMES = ("data.sampling=seconds", "data.fps=1.0", "data.resize=pil", "model.absent_frames=grey")
"""How the published code takes them (configs/protocol/)."""


def _known(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Without what holds no weight; raises UserError for a layout that is not EMCL-Net's."""
    known = {name: value for name, value in state.items() if name.rpartition(".")[2] not in OPENAI_KEYS}
    for name in known:
        for first, what in OTHERS.items():
            if name.startswith(first):
                raise UserError(f"{file} holds {name}, of {what}: only CLIP and a transformer over frames are known")
    if "clip.visual.proj" not in known or "clip.text_projection" not in known:
        first = next(iter(known), "nothing")
        raise UserError(
            f"{file} is no checkpoint of EMCL-Net's or CLIP4Clip's code (it has {first}, and no clip.visual.proj): "
            "--init takes runs of ours, model.pretrained plain CLIPs"
        )
    for name in known:
        if our_name(name) is None and not _is_mu(name):
            raise UserError(f"{file} holds {name}, which neither EMCL-Net's nor CLIP4Clip's retrieval has")
    return known


def _is_mu(name: str) -> bool:
    return name.rpartition(".")[2] == "mu"


def _read_mu(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise UserError(f"--mu {path} is no .npy of numbers: {first_line(error)}") from None


def _numbers(source: Path, mu: Tensor) -> Tensor:
    """(K,) or (1, K) -> (K,); raises UserError for anything else."""
    flat = mu.reshape(-1).float() if mu.is_floating_point() else mu.new_zeros(0)
    if mu.ndim not in (1, 2) or mu.shape[-1] != flat.numel() or not flat.numel() or not flat.isfinite().all():
        raise UserError(f"{source}: mu is no row of finite numbers, one for each basis")
    return flat


def _architecture(state: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """The CLIP in open_clip's format, from the shapes of its weights."""
    try:
        width, _, patch, _ = state["clip.visual.conv1.weight"].shape
        side = round((len(state["clip.visual.positional_embedding"]) - 1) ** 0.5) * patch
        words, text_width = state["clip.token_embedding.weight"].shape
        embed = state["clip.text_projection"].shape[1]
        context = len(state["clip.positional_embedding"])
        narrow = min(width, text_width) < HEAD_WIDTH
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{file}: its CLIP is not of OpenAI's layout ({first_line(error)})") from None
    if narrow or "clip.logit_scale" not in state or state["clip.logit_scale"].numel() != 1:
        reason = f"{width} and {text_width} wide" if narrow else "no one clip.logit_scale"
        raise UserError(f"{file}: its CLIP is not of OpenAI's layout ({reason})")
    if POSITIONS in state and state[POSITIONS].ndim != 2:
        raise UserError(f"{file}: {POSITIONS} is no table of positions")
    return {
        "embed_dim": embed,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": side,
            "layers": _blocks(state, "clip.visual.transformer.resblocks."),
            "width": width,
            "head_width": HEAD_WIDTH,
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": words,
            "width": text_width,
            "heads": text_width // HEAD_WIDTH,
            "layers": _blocks(state, "clip.transformer.resblocks."),
        },
    }


def _blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {int(found[1]) for name in state if (found := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
    return len(numbers)


def _name_of(architecture: Mapping[str, Any]) -> str | None:
    """Open_clip's name of the architecture, without which the run keeps it in a file."""

    def sizes(of: Mapping[str, Any]) -> tuple[Any, ...]:
        vision, text = of["vision_cfg"], of["text_cfg"]
        return (
            of["embed_dim"],
            *(vision.get(key) for key in ("image_size", "layers", "width", "patch_size")),
            *(text.get(key) for key in ("context_length", "vocab_size", "width", "heads", "layers")),
        )

    wanted = sizes(architecture)
    names = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")
    return next((name for name in names if sizes(model_json(name)) == wanted), None)


def _settings(
    state: Mapping[str, Tensor], architecture: dict[str, Any], mu: Tensor | None, name: str, recipe: Config
) -> list[str]:
    """What follows from the weights; of texts, as many tokens as the recipe has, where there are so many positions."""
    layers, context = _blocks(state, BLOCKS), architecture["text_cfg"]["context_length"]
    temporal = ["model.temporal=mean"]
    if layers:
        temporal = ["model.temporal=transformer", f"model.temporal_layers={layers}", "model.temporal_start=text"]
    return [
        f"model.name={name}", "model.pretrained=null", "model.quick_gelu=true", *temporal,
        f"data.image_size={architecture['vision_cfg']['image_size']}", *FRAMES,
        f"data.max_tokens={min(recipe.data.max_tokens, context)}",
        *([] if mu is None else [f"emcl.bases={mu.numel()}"]),
    ]  # fmt: skip


def _fill(model: VideoLanguageModel, state: Mapping[str, Tensor], mu: Tensor | None, file: Path) -> None:
    """Raises UserError: a weight is missing, or of another shape."""
    own = model.state_dict()
    taken = {ours: value for name, value in state.items() if (ours := our_name(name)) is not None}
    taken[f"tasks.{TASK}.logit_scale"] = taken[f"tasks.{TASK}.logit_scale"].reshape(1)
    positions = "backbone.temporal.positions"
    fits = positions in taken and positions in own and taken[positions].shape[1] == own[positions].shape[1]
    if fits and len(taken[positions]) < len(own[positions]):
        longer = torch.zeros_like(own[positions])  # no video has so many frames: data.frames is checked
        longer[: len(taken[positions])] = taken[positions]
        taken[positions] = longer
    if mu is not None and f"tasks.{TASK}.emcl.mu" in own:
        taken[f"tasks.{TASK}.emcl.mu"] = mu
    for name in taken:
        if name not in own:
            raise UserError(f"{file} holds another architecture than {model.backbone.config.name}: {name} is unknown")
        if difference := different_shape(name, taken, own):
            raise UserError(f"{file} holds another architecture than {model.backbone.config.name}: {difference}")
    lacking = next((name for name in own if name not in taken and not name.startswith(f"tasks.{TASK}.emcl.")), None)
    if lacking is not None:
        raise UserError(f"{file} lacks {lacking} of {model.backbone.config.name}")
    model.load_state_dict(taken, strict=False)


def _said(state: Mapping[str, Tensor], config: Config, mu: Tensor | None, folder: RunFolder) -> list[str]:
    layers, model, data = _blocks(state, BLOCKS), config.model, config.data
    over_time = f"a transformer of {layers} layers over the frames" if layers else "no transformer over the frames"
    lines = [
        f"{folder}: {model.name}, {over_time}; {data.frames} frames of {data.image_size} pixels, "
        f"{data.max_tokens} tokens"
    ]
    if config.emcl.enabled:
        said = f"EMCL {config.emcl.variant}, {config.emcl.bases} bases"
        if config.emcl.variant == "compact":
            said += "; it adds nothing until it has been fitted (emcl index --emcl)"
        elif mu is None:
            said += f"; the file has no mu: EM starts from the signs of seed {config.seed}"
        lines.append(said)
    lines.append(f"score it by emcl evaluate {folder} data.test=SHARDS; emcl.load('{folder.best}') opens it")
    return lines
