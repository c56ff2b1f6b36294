"""PE-Core, SigLIP 2 and MobileCLIP2: features are those of open_clip's own pipeline, and a text's are its own."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import av
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import emcl
from conftest import TINY, small
from emcl.cli import main
from emcl.config import Config, fingerprint_text, resolve
from emcl.data.decode import decode
from emcl.data.frame_shapes import ByFFmpeg, ByPIL, evaluated_shape
from emcl.data.shards import open_shards
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.inference import VideoTextModel
from emcl.model.backbone import build_backbone
from emcl.model.contrastive import sigmoid_loss
from emcl.model.model_settings import ModelConfig
from emcl.model.open_clip_backbone import OpenClipBackbone, model_json, preprocessing
from emcl.multitask import VideoLanguageModel
from emcl.prepare.pretrained_towers import write_towers
from emcl.train.initialization import as_pretrained
from emcl.train.plan import describe_plan
from emcl.train.run import run
from emcl.train.run_config import config_of_run
from ranks import run_on_ranks

TOWERS = {"PE-Core-T-16-384": "meta", "ViT-B-32-SigLIP2-256": "webli", "MobileCLIP2-S0": "dfndr2b"}
"""The smallest of each family, with the tag of their weights."""
RECIPES = {
    "msrvtt_pe_core": "PE-Core-B-16",
    "msrvtt_siglip2": "ViT-B-16-SigLIP2",
    "msrvtt_mobileclip2": "MobileCLIP2-S2",
}
TEXTS = ["a dog runs", "Two people: cook, in a KITCHEN & then they eat what they have cooked", "", "rain " * 90]
LAYERS, WORDS = 2, 300
"""Of the text towers here, since tests build them anew."""


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of SigLIP 2's kind: byte pairs without a start, with an end, padded by 0 on the right."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE(unk_token="<unk>"))
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pairs.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, show_progress=False))
    pairs.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer")
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=pairs, padding_side="right", **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=TOWERS)
def tower(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """open_clip's model with random weights, its transform and tokenizer; and settings of ours for the same files."""
    name, folder = request.param, tmp_path_factory.mktemp("tower")
    architecture = open_clip.get_model_config(name)
    text = architecture["text_cfg"]
    text["layers"] = LAYERS
    if "hf_tokenizer_name" in text:
        text |= {"hf_tokenizer_name": str(tokenizer_folder), "vocab_size": WORDS}
    path = folder / f"small-{name}.json"
    path.write_text(json.dumps(architecture))
    open_clip.add_model_config(path)
    wanted = preprocessing(name, TOWERS[name])
    assert wanted is not None
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(
        path.stem, image_mean=wanted.mean, image_std=wanted.std, image_interpolation=wanted.interpolation,
        image_resize_mode=wanted.resize_mode,
    )  # fmt: skip
    torch.save(model.state_dict(), folder / "weights.pt")
    size = architecture["vision_cfg"]["image_size"]
    settings = [
        f"model.name={path}", f"model.pretrained={folder}/weights.pt", "model.temporal=mean", "emcl.enabled=false",
        f"model.mean={list(wanted.mean)}", f"model.std={list(wanted.std)}",
        f"data.interpolation={wanted.interpolation}", f"data.resize_mode={wanted.resize_mode}",
        f"data.image_size={size}", "data.resize=pil", "data.frames=2", f"data.max_tokens={text['context_length']}",
    ]  # fmt: skip
    return model.eval(), transform, open_clip.get_tokenizer(path.stem), settings


@torch.no_grad()
def test_image_features_are_those_of_open_clips_own_pipeline(tower: Any, sample_shards: Path) -> None:
    theirs, transform, _, settings = tower
    config = resolve(["retrieval"], overrides=settings)
    backbone, shape = build_backbone(config).eval(), evaluated_shape(config.data)
    shards = open_shards(f"{sample_shards}/val-000000.tar")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, side, np.uint8) for side in ((180, 320, 3), (500, 300, 3))]
    with av.open(io.BytesIO(shards.read(shards.rows[0]))) as container:
        pictures.append(next(container.decode(video=0)).to_ndarray(format="rgb24"))
    for pixels in pictures:
        frame = shape(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
        ours = backbone.encode_frames(torch.tensor(frame)[None])
        wanted = theirs.encode_image(transform(Image.fromarray(pixels))[None])
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_features_are_those_of_open_clips_own_pipeline_alone_and_among_others(tower: Any) -> None:
    theirs, _, tokenize, settings = tower
    config = resolve(["retrieval"], overrides=settings)
    backbone = build_backbone(config).eval()
    together = backbone.encode_text(backbone.tokenize(TEXTS))
    torch.testing.assert_close(together, theirs.encode_text(tokenize(TEXTS)), atol=1e-5, rtol=1e-5)
    for text, among in zip(TEXTS, together, strict=True):
        (alone,) = backbone.encode_text(backbone.tokenize([text]))
        torch.testing.assert_close(alone, among, atol=1e-5, rtol=1e-5)


KINDS = {
    "clipa": {"tokenizer_kwargs": {"strip_sep_token": True}, "no_causal_mask": True, "pool_type": "last"},
    "worldwide": {"pool_type": "eos", "eos_id": 102},
    "coca": {"embed_cls": True, "output_tokens": False},
}
"""Of text towers: those that pool the last place, as SigLIP's do, and strip a token; causal ones with a Hugging Face
tokenizer; and those with a class token after the padding."""


@pytest.mark.parametrize("name", ["tiny", "lite0_minilm", "ViT-B-32", "MobileCLIP2-S2", "PE-Core-B-16", *KINDS])
@torch.no_grad()
def test_a_text_alone_has_the_embedding_that_it_has_among_others(
    name: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every kind of tokenizer that is shipped."""
    monkeypatch.chdir(tmp_path)
    write_towers(tmp_path / "weights" / "towers")
    architecture = json.loads(Path(TINY).read_text()) if name in KINDS else _architecture(name)
    text = architecture["text_cfg"]
    if name in KINDS:
        text |= {**KINDS[name], "context_length": 20}
        text |= {} if name == "coca" else {"hf_tokenizer_name": "weights/towers/minilm"}
    elif "layers" in text:
        text["layers"] = LAYERS
    path = tmp_path / f"of-{name}.json"
    path.write_text(json.dumps({**architecture, "vision_cfg": json.loads(Path(TINY).read_text())["vision_cfg"]}))
    backbone = build_backbone(resolve(["retrieval"], overrides=[f"model.name={path}", "data.max_tokens=16"])).eval()
    together = F.normalize(backbone.encode_text(backbone.tokenize(TEXTS)), dim=1)
    for text, among in zip(TEXTS, together, strict=True):
        alone = F.normalize(backbone.encode_text(backbone.tokenize([text])), dim=1)[0]
        assert float(alone @ among) > 1 - 1e-6, text


def _architecture(name: str) -> dict[str, Any]:
    return json.loads(json.dumps(model_json(name)))


def test_how_frames_are_wanted_is_known_by_tag_and_for_files_and_kept_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "file.pt").touch()
    for name, tag in {**TOWERS, "PE-Core-B-16": "meta", "ViT-B-16-SigLIP2": "webli"}.items():
        of_tag = preprocessing(name, tag)
        assert of_tag == preprocessing(name, f"{tmp_path}/file.pt") and of_tag is not None
        theirs = open_clip.get_pretrained_cfg(name, tag)
        assert list(of_tag.mean) == list(theirs["mean"]) and of_tag.resize_mode == theirs["resize_mode"]
    pe = preprocessing("PE-Core-B-16", "meta")
    assert pe is not None and (pe.mean, pe.resize_mode, pe.interpolation) == ((0.5,) * 3, "squash", "bilinear")
    assert preprocessing("ViT-B-32", "openai") is None and preprocessing("ViT-L-14", f"{tmp_path}/file.pt") is None
    completed = as_pretrained(resolve(None, "msrvtt_pe_core"))
    assert completed.model.mean == completed.model.std == [0.5, 0.5, 0.5]
    assert (completed.data.resize_mode, completed.data.interpolation) == ("squash", "bilinear")
    own = as_pretrained(resolve(None, "msrvtt_pe_core", ["data.resize_mode=shortest", "model.mean=[0, 0, 0]"]))
    assert (own.model.mean, own.data.resize_mode, own.data.interpolation) == ([0, 0, 0], "shortest", "bilinear")
    usual = resolve(None, "msrvtt_retrieval", ["model.quick_gelu=true"])
    assert as_pretrained(usual) == usual, "an index of before knows its model"
    assert fingerprint_text(as_pretrained(usual)) == fingerprint_text(usual)


@pytest.mark.parametrize(("recipe", "name"), RECIPES.items())
def test_a_recipe_has_the_sizes_of_its_towers(recipe: str, name: str) -> None:
    config, architecture = resolve(None, recipe), _architecture(name)
    assert (config.model.name, config.data.resize) == (name, "pil")
    assert config.data.image_size == architecture["vision_cfg"]["image_size"]
    assert config.data.max_tokens == architecture["text_cfg"]["context_length"]
    assert (config.tasks["retrieval"].loss == "sigmoid") == ("init_logit_bias" in architecture)
    assert config.model.pretrained in open_clip.list_pretrained_tags_by_model(name)
    with torch.device("meta"):
        model = VideoLanguageModel(config, load_weights=False)
    bias: Any = model.tasks["retrieval"].logit_bias  # type: ignore[union-attr]
    assert (bias is not None and bias.is_floating_point()) == ("init_logit_bias" in architecture)


def test_an_exported_run_keeps_all_of_it(tower: Any, sample_shards: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Trained by the sigmoid loss for a step, frozen and cached; opened again, it gives open_clip's text features."""
    theirs, transform, tokenize, settings = tower
    monkeypatch.chdir(tmp_path)
    frozen = ["model.frozen=[image,text]", "model.cache_features=true", "tasks.retrieval.loss=sigmoid"]
    quick = [
        "optim.max_steps=1",
        "name=one",
        "data.val=null",
        "data.batch_size=4",
        "model.activation_checkpointing=false",
    ]
    shards = [setting for setting in small(sample_shards) if setting.startswith(("data.t", "data.g", "tracking"))]
    few = [f"data.train={sample_shards}/val-000000.tar", f"data.test={sample_shards}/val-000000.tar"]
    run(["retrieval"], overrides=[*shards, *few, *settings, *frozen, *quick])
    model = emcl.load("runs/one")
    assert model.config.model.mean is not None and model.config.data.resize_mode is not None
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(TEXTS), theirs.encode_text(tokenize(TEXTS)), atol=1e-5, rtol=1e-5)
        pixels = np.random.default_rng(0).integers(0, 256, (1, 200, 300, 3), np.uint8)
        wanted = theirs.encode_image(transform(Image.fromarray(pixels[0]))[None])
        if not len(theirs.visual.head):  # ours is new where open_clip has a head
            torch.testing.assert_close(model.encode_video(pixels).frames[:, 0], wanted, atol=1e-5, rtol=1e-5)
    head: Any = model.model.tasks["retrieval"]
    assert head.logit_bias is not None and head.logit_bias.shape == (1,)
    path, size = settings[0], next(setting for setting in settings if setting.startswith("data.image_size"))
    other = config_of_run(None, "msrvtt_retrieval", [path, size], evaluate=Path("runs/one"), resumed=None)
    assert (other.model.mean, other.data.resize_mode) == (model.config.model.mean, model.config.data.resize_mode)
    assert other.data.interpolation == model.config.data.interpolation, "scored with another recipe"


def test_the_towers_own_scale_and_bias_begin_the_sigmoid_loss(tower: Any) -> None:
    theirs, _, _, settings = tower
    overrides = [*settings, "tasks.retrieval.loss=sigmoid"]
    config = resolve(["retrieval"], overrides=overrides)
    model = VideoTextModel(_model(config), config, [])
    head: Any = model.model.tasks["retrieval"]
    assert head.logit_scale.item() == pytest.approx(theirs.logit_scale.item())
    bias = -10.0 if theirs.logit_bias is None else theirs.logit_bias.item()
    assert head.logit_bias.item() == pytest.approx(bias)
    given = resolve(["retrieval"], overrides=[*overrides, "tasks.retrieval.logit_bias=-3"])
    assert _model(given).tasks["retrieval"].logit_bias.item() == -3.0


def _model(config: Config) -> Any:
    return VideoLanguageModel(config)


def _sigmoid(ranks: Ranks, logits: torch.Tensor, present: torch.Tensor, video: torch.Tensor) -> tuple[float, Any]:
    own = logits[ranks.share(len(logits))].clone().requires_grad_()
    share = sigmoid_loss(own, ranks, present, video)
    share.backward()
    return float(ranks.sum(share.detach())), own.grad


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_sigmoid_loss_is_siglips(world_size: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 6, generator=generator)
    present, video = torch.ones(6, dtype=torch.bool), torch.arange(6)
    theirs = open_clip.loss.SigLipLoss()
    plain = theirs(logits, torch.eye(6), logit_scale=1.0, logit_bias=0.0)  # it takes features, and multiplies them
    parts = run_on_ranks(_sigmoid, world_size, tmp_path, logits, present, video)
    assert all(total == pytest.approx(float(plain), rel=1e-5) for total, _ in parts)
    present[4], video[5] = False, 0
    reference = logits.clone().requires_grad_()
    kept = present[:, None] & present[None, :] & ((video[:, None] != video[None, :]) | torch.eye(6, dtype=torch.bool))
    signs = 2 * torch.eye(6) - 1
    (-(F.logsigmoid(signs * reference) * kept).sum() / 5).backward()
    parts = run_on_ranks(_sigmoid, world_size, tmp_path, logits, present, video)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), reference.grad, atol=1e-6, rtol=1e-5)


def pictures(video: bytes) -> list[Image.Image]:
    """The two frames that our evaluation takes, whole."""
    whole = decode(video, frames=2, size=0, shape=lambda frame: frame.to_ndarray(format="rgb24"))
    return [Image.fromarray(pixels) for pixels in whole]


def test_a_plain_tower_becomes_a_run_that_is_scored_zero_shot(
    tower: Any, sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, transform, tokenize, settings = tower
    monkeypatch.chdir(tmp_path)
    name, file = (settings[at].partition("=")[2] for at in (0, 1))
    known = [setting for setting in settings if setting.startswith(("model.mean", "model.std", "data.r", "data.i"))]
    few = ["data.frames=2", f"data.test={sample_shards}/val-000000.tar", "tracking.enabled=false"]
    assert main(["import", file, "--out", "runs/plain", "--plain", name, *known, *few]) == 0
    assert "zero-shot; 2 frames of" in capsys.readouterr().out
    kept: Any = emcl.load("runs/plain").model.tasks["retrieval"]
    assert (kept.logit_bias is None) == (theirs.logit_bias is None)
    assert kept.logit_bias is None or kept.logit_bias.item() == pytest.approx(theirs.logit_bias.item())
    (scores,) = run(None, evaluate_path=Path("runs/plain")).values()
    shards = open_shards(f"{sample_shards}/val-000000.tar")
    texts = [caption for row in shards.rows for caption in row.sample.captions]
    with torch.no_grad():
        text = F.normalize(theirs.encode_text(tokenize(texts)), dim=1)
        clips = [torch.stack([transform(one) for one in pictures(shards.read(row))]) for row in shards.rows]
        frames = torch.stack(clips)
        video = theirs.encode_image(frames.flatten(0, 1)).view(*frames.shape[:2], -1).mean(1)
    order = (text @ F.normalize(video, dim=1).T).argsort(1, descending=True)
    owner = torch.tensor([number for number, row in enumerate(shards.rows) for _ in row.sample.captions])
    assert scores.metrics["text_to_video/R@1"] == pytest.approx(100 * float((order[:, 0] == owner).float().mean()))
    assert main(["import", file, "--out", "runs/plain", "--plain", name]) == 2
    assert "is a run already" in capsys.readouterr().err
    assert main(["import", file, "--out", "runs/other", "--plain", "PE-Core-B16"]) == 2
    assert "did you mean 'PE-Core-B-16'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.name=PE-Core-B16"], "unknown model.name 'PE-Core-B16', did you mean 'PE-Core-B-16'?"),
        (
            ["model.name=PE-Core-B-16", "data.image_size=224", "data.max_tokens=33"],
            "data.max_tokens=33 is not a whole number from 2 to 32",
        ),
        (["model.name=PE-Core-B-16", "data.image_size=256"], "data.image_size=256 is not 224"),
        (["tasks.retrieval.logit_bias=-10"], "tasks.retrieval.logit_bias is one of loss=sigmoid"),
        (["tasks.retrieval.loss=sigmod"], "tasks.retrieval.loss=sigmod"),
        (["data.resize_mode=longest"], "data.resize_mode=longest"),
        (["model.mean=[0.5]"], "model.mean"),
        (["model.std=[1, 1, 0]"], "model.std"),
    ],
)
def test_a_wrong_setting_of_a_tower_is_one_line(settings: list[str], said: str, capsys: Any) -> None:
    assert main(["config", "--task", "retrieval", *settings]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error


def test_a_plan_is_made_without_the_tokenizer(tmp_path: Path) -> None:
    where = [f"data.root={tmp_path}/none", f"model.tokenizer={tmp_path}/none"]
    text = describe_plan(resolve(None, "msrvtt_siglip2", where))
    assert f"missing: model.tokenizer={tmp_path}/none: no such folder" in text and "text tower" in text


def test_a_run_of_before_goes_on_with_the_frames_that_it_began_with(sample_shards: Path) -> None:
    """Its settings do not say how its tower wants them, since they were not asked."""
    of_before = resolve(["retrieval"], overrides=["model.name=PE-Core-B-16", "model.pretrained=meta"])
    assert as_pretrained(of_before, begun=True).data == of_before.data
    assert as_pretrained(of_before).data.resize_mode == "squash"


def test_questions_are_answered_by_a_tower_that_keeps_padding(tmp_path: Path) -> None:
    architecture = json.loads(Path(TINY).read_text())
    architecture["text_cfg"] |= {"no_causal_mask": True, "context_length": 20}
    (tmp_path / "bidirectional.json").write_text(json.dumps(architecture))
    for head in ("masked", "reference"):
        config = resolve(["msrvtt_qa"], overrides=[
            f"model.name={tmp_path}/bidirectional.json", "data.image_size=32", "data.frames=2", "data.max_tokens=16",
            "tasks.msrvtt_qa.answers=[yes, no]", f"tasks.msrvtt_qa.head={head}", "emcl.bases=8",
        ])  # fmt: skip
        model = VideoLanguageModel(config).eval()
        task: Any = model.tasks["msrvtt_qa"]
        ids = model.backbone.tokenize(["what is it?"])
        tokens, mask = task.tokens(model.backbone, ids)
        assert ids.shape == mask.shape == (1, 20) and tokens.shape[:2] == (1, 20)
        assert mask.sum() < 10


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_ffmpeg_resizes_as_pil_does_but_for_its_rounding(mode: str, interpolation: str) -> None:
    across, down = np.linspace(0, 250, 300), np.linspace(0, 250, 120)
    pixels = np.stack(np.broadcast_arrays(across[None, :], down[:, None], 100.0), -1).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    ours, pil = (kind(48, mode, interpolation)(frame).astype(int) for kind in (ByFFmpeg, ByPIL))
    assert ours.shape == pil.shape == (48, 48, 3) and np.abs(ours - pil).max() <= 4
    seen_across = {"squash": 250, "shortest": 100}[mode]  # the centre is 120 of 300 pixels
    assert np.ptp(ours[..., 0]) == pytest.approx(seen_across, abs=8)


def test_a_shape_that_was_used_goes_to_another_process() -> None:
    frame = av.VideoFrame.from_ndarray(np.zeros((40, 60, 3), np.uint8), format="rgb24")
    for shape in (ByFFmpeg(32), ByPIL(32, augment="rand-m7-n4")):
        shape(frame)
        again = pickle.loads(pickle.dumps(shape))
        assert again == shape and again(frame).shape == (32, 32, 3)


def test_missing_tokenizer_files_are_one_line_that_says_the_way_out(tokenizer_folder: Path, tmp_path: Path) -> None:
    def of(name: str, folder: str | None) -> Any:
        return OpenClipBackbone.tokenizer(ModelConfig(name=name, tokenizer=folder), 64)

    with pytest.raises(
        UserError, match=r"the tokenizer timm/ViT-B-16-SigLIP2 is neither on .* model\.tokenizer=FOLDER"
    ):
        of("ViT-B-16-SigLIP2", None)
    with pytest.raises(UserError, match=r"model\.tokenizer=.*/none: no such folder"):
        of("ViT-B-16-SigLIP2", f"{tmp_path}/none")
    with pytest.raises(UserError, match=r"model\.tokenizer=.* holds no tokenizer"):
        of("ViT-B-16-SigLIP2", str(tmp_path))
    with pytest.raises(UserError, match="PE-Core-B-16 has CLIP's own tokenizer"):
        OpenClipBackbone.tokenizer(ModelConfig(name="PE-Core-B-16", tokenizer=str(tokenizer_folder)), 32)
    assert of("ViT-B-16-SigLIP2", str(tokenizer_folder))(["a dog"]).shape == (1, 64)
    with pytest.raises(UserError, match=r"PE-Core-T-16-384, pretrained meta: .*model\.pretrained=FILE takes them"):
        build_backbone(resolve(["retrieval"], overrides=["model.name=PE-Core-T-16-384", "model.pretrained=meta"]))
