"""Patch embeddings as matrix products: the convolution's values, gradients and names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from emcl.model import patches
from emcl.model.model_settings import ModelConfig
from emcl.model.open_clip_backbone import build_towers
from emcl.model.patches import embed_patches_by_product, patch_product


@pytest.mark.parametrize(
    ("size", "patch", "bias"), [((64, 64), (32, 32), False), ((70, 65), (14, 16), True), ((9, 8), (2, 4), True)]
)
def test_the_product_is_the_convolution_and_leaves_out_the_same_rest(
    size: tuple[int, int], patch: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, patch, patch, bias=bias).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    wanted, product = layer(images), patch_product(images, layer.weight, layer.bias)
    torch.testing.assert_close(product, wanted)
    gradients = [torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (wanted, product)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_only_convolutions_that_tile_the_image_are_taken() -> None:
    others = [
        nn.Conv2d(3, 4, 3, 2), nn.Conv2d(3, 4, 2, 2, padding=1), nn.Conv2d(4, 4, 2, 2, groups=2),
        nn.Conv2d(3, 4, 2, 2, dilation=2), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 2, 2),
    ]  # fmt: skip
    tiling = [nn.Conv2d(3, 4, 2, 2), nn.Conv2d(3, 4, 2, 2, padding="valid")]
    embed_patches_by_product(nn.ModuleList([*others, *tiling]))
    assert all(type(layer) is nn.Conv2d for layer in others)
    assert not any(type(layer) is nn.Conv2d for layer in tiling)


def test_on_a_gpu_the_layer_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, images = nn.Conv2d(3, 5, 4, 4).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    wanted = layer(images)
    embed_patches_by_product(nn.ModuleList([layer]))
    assert torch.equal(layer(images), wanted)  # a CPU keeps the convolution
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(nn.Conv2d, "forward", None)
    torch.testing.assert_close(layer(images), wanted)


def test_clips_vision_transformer_has_one_and_keeps_its_weights_names() -> None:
    torch.manual_seed(0)
    trunk = build_towers(ModelConfig(name="ViT-B-32"), max_tokens=32, load_weights=False).image.trunk
    assert isinstance(trunk.conv1, patches._PatchEmbedding)
    assert "conv1.weight" in trunk.state_dict()
