"""Vision transformers: position embedding against loops, what is frozen and what is not, sizes."""

import math

import pytest
import timm
import torch

from poisonshield.errors import ConfigError
from poisonshield.models.backbones import BackboneConfig, build_encoder
from poisonshield.models.position import fix_position, sincos

VIT = {"name": "vit_tiny_patch16_224", "stem": "imagenet"}


def vit(**settings):
    return build_encoder(BackboneConfig(**VIT, **settings))


def slow_sincos(rows, columns, dim):
    """One number at a time."""
    quarter, out = dim // 4, []
    for r in range(rows):
        for c in range(columns):
            line = []
            for place in (c, r):
                for wave in (math.sin, math.cos):
                    line += [wave(place / 10000 ** (k / quarter)) for k in range(quarter)]
            out.append(line)
    return out


@pytest.mark.parametrize(("rows", "columns", "dim"), [(2, 3, 8), (14, 14, 192), (1, 1, 4), (5, 2, 12)])
def test_sines_and_cosines_are_their_formula(rows, columns, dim):
    expected = torch.tensor(slow_sincos(rows, columns, dim), dtype=torch.float64)
    torch.testing.assert_close(sincos(rows, columns, dim).double(), expected, atol=1e-6, rtol=0)


def test_width_that_four_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="4 divides; this network has 10"):
        sincos(2, 2, 10)


def frozen(encoder):
    return {name.removeprefix("backbone.") for name, p in encoder.named_parameters() if not p.requires_grad}


PATCH = {"patch_embed.proj.weight", "patch_embed.proj.bias"}


@pytest.mark.parametrize(
    ("settings", "fixed"),
    [
        ({}, set()),
        ({"position": "learned"}, set()),
        ({"position": "sincos"}, {"pos_embed"}),
        ({"freeze_patch": True}, PATCH | {"pos_embed"}),
        ({"freeze_patch": True, "position": "learned"}, PATCH),
    ],
    ids=["nothing", "learned", "sincos", "patch", "patch, learned"],
)
def test_patch_and_position_are_frozen_apart_from_each_other(settings, fixed):
    """A frozen patch projection never leaves a random embedding frozen beside it."""
    encoder = vit(**settings)
    assert frozen(encoder) == fixed
    embedding = encoder.backbone.pos_embed[0]
    is_sincos = torch.equal(embedding[1:], sincos(14, 14, 192)) and not embedding[0].any()
    assert is_sincos == ("pos_embed" in fixed)
    encoder(torch.rand(1, 3, 224, 224)).sum().backward()
    without = {n.removeprefix("backbone.") for n, p in encoder.named_parameters() if p.grad is None}
    assert without == fixed


@pytest.mark.parametrize(
    ("name", "prefix"), [("deit_tiny_distilled_patch16_224", 2), ("deit3_small_patch16_224", 0)], ids=str
)
def test_extra_tokens_get_zeros(name, prefix):
    embedding = build_encoder(BackboneConfig(name=name, stem="imagenet", position="sincos")).backbone.pos_embed[0]
    assert not embedding[:prefix].any() and torch.equal(embedding[prefix:], sincos(14, 14, embedding.shape[1]))


def test_network_without_position_embedding_is_refused():
    with pytest.raises(ConfigError, match="resnet18 has no position embedding of its own to replace"):
        fix_position(timm.create_model("resnet18"), "resnet18")


def test_image_size_makes_the_grid_and_other_sizes_still_run():
    encoder = vit(image_size=64, position="sincos").eval()
    assert encoder.backbone.patch_embed.grid_size == (4, 4) and encoder.backbone.pos_embed.shape == (1, 17, 192)
    for side in (64, 32, 96):
        assert encoder(torch.rand(1, 3, side, side)).shape == (1, encoder.feature_dim) == (1, 192)


def test_own_size_is_kept_without_a_setting():
    assert vit().backbone.patch_embed.grid_size == (14, 14)


@pytest.mark.parametrize(("size", "near"), [(28, 16), (100, 96), (8, 16)])
def test_size_that_patches_do_not_divide_is_refused(size, near):
    with pytest.raises(ConfigError, match=f"image_size: {size} is not a multiple .* 16 px. Set it to {near}"):
        vit(image_size=size)


def test_weights_start_as_in_moco_v3():
    """Uniform within sqrt(6 / (inputs + outputs)), query, key and value each for itself; biases zero."""
    torch.manual_seed(0)
    backbone = vit().backbone
    block = backbone.blocks[3]
    bounds = {
        backbone.patch_embed.proj: math.sqrt(6 / (3 * 16 * 16 + 192)),
        block.attn.qkv: math.sqrt(6 / (192 + 192)),
        block.mlp.fc1: math.sqrt(6 / (192 + 768)),
    }
    for layer, bound in bounds.items():
        assert 0.99 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()


@pytest.mark.parametrize("settings", [{}, {"freeze_patch": True}], ids=str)
def test_vit_loads_strictly_in_timm(settings):
    encoder = vit(**settings).eval()
    theirs = timm.create_model(VIT["name"], num_classes=0).eval()
    theirs.load_state_dict(encoder.backbone.state_dict(), strict=True)
    x = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(encoder(x), theirs(encoder.normalize(x)))
