"""Encoders: shapes, stems, strict export names; normalization; batch norm over ranks when alone."""

import copy
import os
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from poisonshield.errors import BackendError, ConfigError
from poisonshield.models.backbones import BackboneConfig, StridedPointwise, build_encoder
from poisonshield.models.batchnorm import SyncedBatchNorm, per_view_statistics, synchronize
from poisonshield.models.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize


@pytest.mark.parametrize(("padding", "side"), [(1, 32), (2, 34)])
def test_cifar_stem_keeps_the_side_and_legacy_padding_widens_it(padding, side):
    backbone = build_encoder(BackboneConfig(name="resnet18", stem_padding=padding)).backbone
    x = torch.rand(1, 3, 32, 32)
    assert backbone.maxpool(backbone.conv1(x)).shape == (1, 64, side, side)
    assert backbone.conv1.bias is None


@pytest.mark.parametrize(
    ("config", "dim"),
    [
        (BackboneConfig(name="resnet18"), 512),
        (BackboneConfig(name="resnet18", stem="imagenet"), 512),
        (BackboneConfig(name="resnet_mini", stem_stride=2), 128),
        (BackboneConfig(name="resnet_mini", widths=(8, 8, 16, 24)), 24),
    ],
)
def test_features_have_the_promised_width(config, dim):
    encoder = build_encoder(config).eval()
    assert encoder.feature_dim == dim and encoder(torch.rand(2, 3, 32, 32)).shape == (2, dim)


def test_imagenet_backbone_loads_strictly_in_timm_and_torchvision():
    import torchvision

    encoder = build_encoder(BackboneConfig(name="resnet18", stem="imagenet")).eval()
    theirs = timm.create_model("resnet18", num_classes=0).eval()
    theirs.load_state_dict(encoder.backbone.state_dict(), strict=True)
    vision = torchvision.models.resnet18()
    vision.fc = nn.Identity()
    vision.load_state_dict(encoder.backbone.state_dict(), strict=True)
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(encoder(x), theirs(encoder.normalize(x)))
    torch.testing.assert_close(encoder(x), vision.eval()(encoder.normalize(x)))


def test_unknown_backbone_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="Did you mean resnet18"):
        build_encoder(BackboneConfig(name="resnet_18"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batch_norm_with_an_activation_inside_is_not_converted(device):
    from timm.layers import BatchNormAct2d

    with pytest.raises(BackendError, match="BatchNormAct2d cannot be synchronized"):
        synchronize(nn.Sequential(BatchNormAct2d(4)), torch.device(device))


def test_network_without_a_stem_to_change_is_refused():
    with pytest.raises(ConfigError, match="Set model.stem: imagenet"):
        build_encoder(BackboneConfig(name="vit_tiny_patch16_224", stem="cifar"))


def test_normalization_is_inside_and_in_pixel_units():
    x = torch.rand(2, 3, 4, 4)
    for c in range(3):
        expected = (x[:, c] - IMAGENET_MEAN[c]) / IMAGENET_STD[c]
        torch.testing.assert_close(Normalize()(x)[:, c], expected)


def test_synchronized_batch_norm_alone_is_plain_batch_norm():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5, affine=False)
    )
    x = torch.rand(6, 3, 5, 5)
    plain(x)
    synced = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5, affine=False)
    )
    synced.load_state_dict(plain.state_dict())
    synced = synchronize(synced, torch.device("cpu"))
    assert isinstance(synced[1], SyncedBatchNorm) and list(synced.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(synced(x), plain(x))


def test_synchronized_norms_keep_the_tensors_mode_and_names_of_those_they_replace():
    shared = nn.BatchNorm1d(3)
    module = nn.Sequential(nn.BatchNorm2d(2, eps=0.1, momentum=None), shared, nn.Sequential(shared)).eval()
    before = module.state_dict(keep_vars=True)
    parameters = dict(module.named_parameters())
    synced = synchronize(module, torch.device("cpu"))
    assert synced is module and synced[1] is synced[2][0] and all(not m.training for m in synced.modules())
    assert all(isinstance(m, SyncedBatchNorm) for m in (synced[0], synced[1]))
    assert synced[0].eps == 0.1 and synced[0].momentum is None
    after = synced.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[k] is before[k] for k in before)
    assert all(p is parameters[name] for name, p in synced.named_parameters())


def test_a_norm_alone_is_synchronized_too():
    norm = nn.BatchNorm1d(3, affine=False, track_running_stats=False)
    synced = synchronize(norm, torch.device("cpu"))
    x = torch.rand(5, 3)
    assert isinstance(synced, SyncedBatchNorm)
    assert torch.equal(synced(x), norm(x))


def test_an_error_inside_leaves_batch_norm_as_it_was():
    norm = nn.BatchNorm1d(2)
    x = torch.rand(6, 2)
    expected = nn.BatchNorm1d(2)(x)
    with pytest.raises(KeyError), per_view_statistics(norm, 3):
        assert not torch.allclose(norm(x), expected)
        raise KeyError
    norm.reset_running_stats()
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3"), ("resnet_mini", "bn2")])
def test_residual_branches_start_at_zero(name, last):
    """As the authors' ResNets do: the last batch norm of a block has weights of zero, every other one of one."""
    backbone = build_encoder(BackboneConfig(name=name)).backbone
    norms = {n: m for n, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert any(n.endswith(last) for n in norms)
    for path, norm in norms.items():
        expected = 0.0 if path.startswith("layer") and path.endswith(last) else 1.0
        assert norm.weight.unique().tolist() == [expected], path


@pytest.mark.parametrize(("padding", "side"), [(1, 28), (2, 30)])
def test_cifar_stem_on_the_crop_of_28(padding, side):
    backbone = build_encoder(BackboneConfig(name="resnet18", stem_padding=padding)).backbone
    assert backbone.conv1(torch.rand(1, 3, 28, 28)).shape == (1, 64, side, side)


@pytest.mark.parametrize("settings", [{"image_size": 96}, {"freeze_patch": True}, {"position": "learned"}], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet_mini"])
def test_settings_of_a_vit_are_refused_elsewhere(name, settings):
    with pytest.raises(ConfigError, match=f"are for ViTs, and {name} is none. Leave them out, or"):
        build_encoder(BackboneConfig(name=name, **settings))


@pytest.mark.parametrize("training", [True, False])
def test_views_together_keep_the_statistics_of_each_view(training):
    """Features, gradients and running statistics are those of views that come one by one."""
    torch.manual_seed(0)
    apart = build_encoder(BackboneConfig(name="resnet_mini", widths=(8, 8, 8, 8))).double().train(training)
    together = copy.deepcopy(apart)
    together.config = BackboneConfig(name="resnet_mini", widths=(8, 8, 8, 8), views_together=True)
    kinds = [type(m) for m in together.modules()]
    views = tuple(torch.rand(4, 3, 16, 16, dtype=torch.float64) * scale for scale in (1.0, 0.5, 0.2))
    results = []
    for encoder in (apart, together):
        features = encoder.views(views)
        sum((h.square() * (i + 1)).sum() for i, h in enumerate(features)).backward()
        results.append((features, [p.grad for p in encoder.parameters()], list(encoder.buffers())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    assert [type(m) for m in together.modules()] == kinds
    whole = together(torch.cat(views)).chunk(3)
    assert training != torch.allclose(whole[0], results[0][0][0])
    small = together.views((views[0], views[1][:, :, :8, :8]))
    assert [h.shape for h in small] == [(4, 8)] * 2


def test_stem_settings_without_that_stem_are_refused():
    with pytest.raises(ValueError, match="belong to stem: cifar"):
        BackboneConfig(stem="imagenet", stem_padding=2)


def test_no_encoder_has_the_convolution_that_corrupts_memory_on_avx2():
    """A strided 1x1 convolution of fewer than 8 input channels; see StridedPointwise."""
    for config in (BackboneConfig(name="resnet_mini", widths=(4, 4, 4, 8)), BackboneConfig(name="resnet18")):
        for module in build_encoder(config).modules():
            if type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.in_channels < 8:
                assert max(module.stride) == 1


@pytest.mark.parametrize("side", [7, 8])
def test_a_stride_taken_first_gives_the_numbers_and_names_of_the_convolution_itself(side):
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 6, 1, 2, bias=False).double()
    ours = StridedPointwise(4, 6, 1, 2, bias=False).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.rand(2, 4, side, side, dtype=torch.float64)
    y = ours(x)
    assert y.shape == theirs(x).shape
    torch.testing.assert_close(y, torch.einsum("oi,bihw->bohw", theirs.weight[:, :, 0, 0], x)[:, :, ::2, ::2])


def test_narrow_encoders_draw_the_weights_that_timm_draws():
    from timm.models.resnet import BasicBlock, ResNet

    torch.manual_seed(3)
    theirs = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(4, 4, 4, 8), stem_type="deep", stem_width=2)
    after = torch.rand(1)
    torch.manual_seed(3)
    ours = build_encoder(BackboneConfig(name="resnet_mini", widths=(4, 4, 4, 8), stem="imagenet")).backbone
    assert torch.equal(torch.rand(1), after)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_a_narrow_encoder_survives_the_instructions_of_avx2_alone():
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from poisonshield.models.backbones import BackboneConfig, build_encoder\n"
        "encoder = build_encoder(BackboneConfig(name='resnet_mini', widths=(4, 4, 4, 8)))\n"
        "encoder = encoder.to(memory_format=torch.channels_last)\n"
        "for _ in range(20):\n"
        "    x = torch.rand(64, 3, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()\n"
        "    y = encoder(x); y.backward(torch.rand_like(y)); junk = [torch.rand(100) for _ in range(50)]\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "MALLOC_CHECK_": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
