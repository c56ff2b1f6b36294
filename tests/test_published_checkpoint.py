"""`emcl import`: what the published code has trained is scored, searched, reported and fine-tuned as a run of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emcl
from conftest import emcl_command, launch, shared, small, write_clips
from emcl.cli import main
from emcl.data.batch import videos_of
from emcl.data.captions import Tokens
from emcl.errors import UserError
from emcl.model.backbone import tokenizer_of
from emcl.run_folder import RunFolder
from emcl.train.export import open_export
from emcl.train.published_checkpoint import import_checkpoint

RECIPE, FRAMES = "msrvtt_retrieval", "data.frames=4"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(shared("golden/published_checkpoint.npz")))


@pytest.fixture
def saved(golden: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """As their training saves it; without `mu`, which is beside it here."""
    state = {
        name.removeprefix("state/"): torch.from_numpy(golden[name]) for name in golden if name.startswith("state/")
    }
    torch.save(state, tmp_path / "pytorch_model.bin.4")
    np.save(tmp_path / "mu.npy", golden["mu"])
    return tmp_path / "pytorch_model.bin.4"


def compared(run: Path, golden: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """What the run gives for the golden batch."""
    model, _ = open_export(RunFolder.open(run).export)
    head: Any = model.tasks["retrieval"]
    clips = [clip.transpose(0, 2, 3, 1) for clip in golden["batch/frames"]]
    videos = videos_of(clips, len(clips[0]))
    with torch.no_grad():
        text, frames = (
            model.backbone.encode_text(torch.from_numpy(golden["batch/text_ids"])),
            model.backbone.encode_video(videos),
        )
        return {
            "text": text, "frames_out": frames,
            "similarity": head.similarity(text, frames, videos.mask_BT, model.ranks, head.emcl),
        }  # fmt: skip


@pytest.mark.parametrize("how", ["beside it", "in the file"])
def test_similarity_is_that_of_the_published_code(how: str, golden: dict[str, np.ndarray], saved: Path) -> None:
    mu = saved.with_name("mu.npy")
    if how == "in the file":
        torch.save({**torch.load(saved), "emcl.mu": torch.from_numpy(golden["mu"])}, saved)
        mu = None
    said = import_checkpoint(saved, saved.parent / "run", RECIPE, [FRAMES], mu=mu)
    assert "EMCL reference, 8 bases" in said[1] and "no mu" not in said[1]
    ours = compared(saved.parent / "run", golden)
    np.testing.assert_allclose(ours["text"], golden["text"], atol=2e-5)
    np.testing.assert_allclose(ours["frames_out"], golden["frames_out"], atol=5e-5)
    np.testing.assert_allclose(ours["similarity"], golden["similarity"], rtol=0, atol=1e-5)


def test_without_mu_the_bases_start_as_the_published_code_starts_them(
    golden: dict[str, np.ndarray], saved: Path
) -> None:
    said = import_checkpoint(saved, saved.parent / "run", RECIPE, [FRAMES, "emcl.bases=8"])
    assert "EM starts from the signs of seed 0" in said[1]
    off = compared(saved.parent / "run", golden)["similarity"] - torch.from_numpy(golden["similarity"])
    assert 1e-5 < off.abs().max() < 1e-3


def test_an_imported_run_is_scored_searched_reported_and_trained_further(saved: Path, sample_shards: Path) -> None:
    """Its vocabulary of 600 is CLIP's byte pairs cut to their first merges, as the tokenizer is then."""
    cwd = saved.parent
    done = emcl_command("import", saved.name, "--out", "runs/theirs", "--mu", "mu.npy", FRAMES, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "a transformer of 4 layers over the frames; 4 frames of 32 pixels, 16 tokens" in done.stdout

    test = f"data.test={sample_shards}/test-000000.tar"
    scored = launch("--evaluate", "runs/theirs", test, cwd=cwd)
    assert scored.returncode == 0, scored.stdout + scored.stderr
    assert "text_to_video" in scored.stdout

    write_clips(sample_shards, cwd / "videos")
    for command in (
        ["index", "videos", "--model", "runs/theirs", "--out", "index"],
        ["search", "index", "a red circle", "--model", "runs/theirs"],
        ["report", "runs/theirs", "--out", "report"],
    ):
        done = emcl_command(*command, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "theirs" in (cwd / "report/report.html").read_text()

    architecture = "model.name=runs/theirs/architecture.json"
    own = [*small(sample_shards), architecture, FRAMES, "emcl.bases=8", "data.max_tokens=16"]
    done = launch("--task", "retrieval", "--init", "runs/theirs", *own, "optim.max_steps=1", "name=further", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starts from runs/theirs/best: backbone, tasks.retrieval" in done.stdout
    further = RunFolder.open(cwd / "runs/further").config().model
    assert (further.temporal_start, further.quick_gelu) == ("text", True)  # which no shape of the weights tells


def test_the_tokenizer_has_the_models_own_number_of_tokens(saved: Path, golden: dict[str, np.ndarray]) -> None:
    import_checkpoint(saved, saved.parent / "run", RECIPE, [FRAMES])
    ids = Tokens(tokenizer_of(RunFolder.open(saved.parent / "run").config())).tokenize(["a red circle", "one"])
    assert ids.shape == (2, 16)
    assert ids[:, 0].tolist() == [598, 598] and ids.max(1).values.tolist() == [599, 599]
    assert int(golden["batch/text_ids"].max()) == 599


@pytest.mark.parametrize(("width", "patch", "name"), [(768, 32, "ViT-B-32"), (768, 16, "ViT-B-16")])
def test_openais_sizes_have_their_names(width: int, patch: int, name: str, tmp_path: Path) -> None:
    """A file of the published sizes, in fp16 as CLIP's own, by DistributedDataParallel's names, without time."""
    positions = (224 // patch) ** 2 + 1
    shapes = {
        "visual.class_embedding": (width,), "visual.positional_embedding": (positions, width),
        "visual.proj": (width, 512), "visual.conv1.weight": (width, 3, patch, patch),
        "positional_embedding": (77, 512), "text_projection": (512, 512), "logit_scale": (),
        "token_embedding.weight": (49408, 512),
        **{f"visual.ln_{which}.{part}": (width,) for which in ("pre", "post") for part in ("weight", "bias")},
        **{f"ln_final.{part}": (512,) for part in ("weight", "bias")},
    }  # fmt: skip
    for tower, size in (("visual.transformer", width), ("transformer", 512)):
        for block in range(12):
            at = f"{tower}.resblocks.{block}."
            shapes |= {f"{at}ln_{n}.{part}": (size,) for n in (1, 2) for part in ("weight", "bias")}
            shapes |= {f"{at}attn.in_proj_weight": (3 * size, size), f"{at}attn.in_proj_bias": (3 * size,)}
            shapes |= {f"{at}attn.out_proj.weight": (size, size), f"{at}attn.out_proj.bias": (size,)}
            shapes |= {f"{at}mlp.c_fc.weight": (4 * size, size), f"{at}mlp.c_fc.bias": (4 * size,)}
            shapes |= {f"{at}mlp.c_proj.weight": (size, 4 * size), f"{at}mlp.c_proj.bias": (size,)}
    state = {f"module.clip.{key}": torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}
    torch.save(state, tmp_path / "pytorch_model.bin.0")
    said = import_checkpoint(tmp_path / "pytorch_model.bin.0", tmp_path / "run", RECIPE, clip4clip=True)
    assert said[0].startswith(f"{tmp_path}/run: {name}, no transformer over the frames; 12 frames of 224 pixels")
    config = RunFolder.open(tmp_path / "run").config()
    assert (config.model.name, config.model.quick_gelu, config.model.temporal) == (name, True, "mean")
    assert not config.emcl.enabled and not (tmp_path / "run/architecture.json").exists()


def test_what_cannot_be_imported_is_named(saved: Path) -> None:
    state = torch.load(saved)

    def refused(changes: dict[str, Any] | None = None, *settings: str, without: str = "", **options: Any) -> str:
        kept = {name: value for name, value in state.items() if not (without and name.startswith(without))}
        torch.save({**kept, **(changes or {})}, saved)
        with pytest.raises(UserError) as wrong:
            import_checkpoint(saved, saved.parent / "run", RECIPE, [FRAMES, *settings], **options)
        assert not (saved.parent / "run").exists()
        assert "\n" not in str(wrong.value) and len(str(wrong.value)) < 300
        return str(wrong.value)

    weight = torch.zeros(2, 2)
    assert "a question answering head" in refused({"classifier.0.weight": weight})
    assert "a recurrent network over the frames" in refused({"lstm_visual.weight_ih_l0": weight})
    assert "which neither EMCL-Net's nor CLIP4Clip's retrieval has" in refused({"decoder.weight": weight})
    assert "no clip.visual.proj): --init takes runs of ours" in refused(without="clip.")
    assert "its CLIP is not of OpenAI's layout" in refused(without="clip.visual.conv1")
    assert "lacks backbone.text.trunk.ln_final.weight" in refused(without="clip.ln_final")
    assert "is (2, 2) there" in refused({"clip.visual.proj": weight})
    assert "has 16 positions in time: give data.frames=16 or less" in refused(None, "data.frames=17")
    assert "temporal.blocks.2.attn.in_proj_weight is unknown" in refused(None, "model.temporal_layers=2")
    assert "is unknown" in refused(None, "model.temporal=mean")
    assert "emcl.bases=200 is not a whole number from 1 to 128" in refused(None, "emcl.bases=200")
    assert "is (3,) there, (8,) here" in refused({"emcl.mu": torch.ones(3)}, "emcl.bases=8")
    assert "--mu" in refused(mu=saved)
    assert "mu is no row of finite numbers" in refused({"emcl.mu": torch.ones(2, 4)})
    assert "mu is no row of finite numbers" in refused({"emcl.mu": torch.full((8,), torch.nan)})
    assert "(no one clip.logit_scale)" in refused(without="clip.logit_scale")
    assert "(no one clip.logit_scale)" in refused({"clip.logit_scale": torch.ones(2)})
    assert "its CLIP is not of OpenAI's layout" in refused({"clip.positional_embedding": torch.ones(())})
    assert "its CLIP is not of OpenAI's layout" in refused({"clip.text_projection": torch.ones(3)})
    assert "is no table of positions" in refused({"frame_position_embeddings.weight": torch.ones(16)})
    assert "no weights by name" in refused({0: weight})
    assert "positional_embedding is (16, 128) there, (77, 512) here" in refused(
        None, "model.name=ViT-B-32", "data.image_size=224"
    )
    assert "epoch is no weight" in refused({"epoch": "7"})
    saved.write_bytes(b"cos\nsystem\n(S'echo run'\ntR.")  # a pickle that runs a command where it is opened
    with pytest.raises(UserError, match="no file of tensors alone"):
        import_checkpoint(saved, saved.parent / "run", RECIPE)
    with pytest.raises(UserError, match="no such file"):
        import_checkpoint(saved.parent / "none.bin", saved.parent / "run", RECIPE)


@pytest.mark.parametrize(
    "arguments",
    [
        ["FILE", "--out", "run", FRAMES, "emcl.bases=8"],
        ["--out", "run", "FILE", "--recipe", "msrvtt_retrieval", FRAMES, "emcl.bases=8"],
        ["FILE", FRAMES, "--out", "run", "emcl.bases=8"],
    ],
)
def test_settings_stand_anywhere_in_the_command(
    arguments: list[str], saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(saved.parent)
    assert main(["import", *(saved.name if word == "FILE" else word for word in arguments)]) == 0
    assert "4 frames of 32 pixels" in (said := capsys.readouterr().out) and "EMCL reference, 8 bases" in said
    with pytest.raises(SystemExit):
        main(["import", saved.name, "--out", "other", "--unknown", FRAMES])
    assert "unrecognized arguments: --unknown" in capsys.readouterr().err


def test_texts_are_as_long_as_the_recipe_has_them(saved: Path) -> None:
    state = torch.load(saved)
    longer = {
        "clip.positional_embedding": torch.zeros(77, 128),
        "frame_position_embeddings.weight": torch.zeros(77, 128),
    }
    torch.save({**state, **longer}, saved)
    for recipe, tokens in (("msrvtt_retrieval", 32), ("published/didemo_retrieval", 64)):
        import_checkpoint(saved, saved.parent / f"run{tokens}", recipe)
        assert RunFolder.open(saved.parent / f"run{tokens}").config().data.max_tokens == tokens


def test_an_imported_run_opens_from_anywhere(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    import_checkpoint(Path(saved.name), Path("run"), RECIPE, [FRAMES])
    monkeypatch.chdir("/")
    assert emcl.load(saved.parent / "run", device="cpu").encode_text("a dog").shape == (1, 128)


def test_a_run_is_not_overwritten(saved: Path) -> None:
    import_checkpoint(saved, saved.parent / "run", RECIPE, [FRAMES])
    before = (saved.parent / "run/best/model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="run is a run already: give another folder"):
        import_checkpoint(saved, saved.parent / "run", RECIPE, [FRAMES])
    assert (saved.parent / "run/best/model.safetensors").stat().st_mtime_ns == before
