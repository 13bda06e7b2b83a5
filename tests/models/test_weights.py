"""A finished run's encoder in another: every kind of file, and what does not fit is named."""

import json

import pytest
import torch
from safetensors.torch import save_file

from poisonshield.errors import CheckpointError, ConfigError
from poisonshield.models.backbones import BackboneConfig, build_encoder
from poisonshield.models.weights import load_encoder

SMALL = {"name": "resnet_mini", "widths": (4, 4, 6, 8)}
CONFIG = BackboneConfig(**SMALL)


def made(seed, config=CONFIG):
    torch.manual_seed(seed)
    encoder = build_encoder(config)
    encoder.backbone.bn1.running_mean.normal_()
    return encoder


def write(path, tensors, config=CONFIG):
    metadata = {"format": "pt", "model": json.dumps(config.model_dump(mode="json"))}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata=metadata)
    return path


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def named(prefix, encoder):
    return {prefix + name: value for name, value in encoder.state_dict().items()}


@pytest.mark.parametrize("prefix", ["encoder.", "method.encoder.", "method.method.encoder."])
@pytest.mark.parametrize("by", ["file", "folder"])
def test_methods_file_gives_its_online_encoder(tmp_path, prefix, by):
    """Alone or within defenses, whatever else the file holds: heads, and a target branch that looks like an encoder."""
    source, target, ours = made(1), made(2), made(3)
    inside = prefix.removesuffix("encoder.")
    tensors = named(prefix, source) | named(f"{inside}target.parts.0.", target)
    tensors |= {"head.weight": torch.ones(2, 8), f"{inside}target.parts.1.0.weight": torch.ones(3)}
    file = write(tmp_path / "export" / "method.safetensors", tensors)
    load_encoder(ours, file if by == "file" else tmp_path)
    assert same(ours, source) and not same(ours, target)
    load_encoder(ours, str(file), branch="target")
    assert same(ours, target)


def test_backbone_file_gives_the_same_encoder(tmp_path):
    source, ours = made(1), made(2)
    load_encoder(ours, write(tmp_path / "backbone.safetensors", source.backbone.state_dict()))
    assert same(ours, source)


def test_what_trains_stays_what_it_was(tmp_path):
    ours = made(2)
    ours.backbone.conv1.requires_grad_(False)
    load_encoder(ours, write(tmp_path / "backbone.safetensors", made(1).backbone.state_dict()))
    assert {p.requires_grad for p in ours.backbone.conv1.parameters()} == {False}
    assert all(p.requires_grad for p in ours.backbone.layer1.parameters())


def test_missing_file_is_named_with_what_would_do(tmp_path):
    with pytest.raises(
        ConfigError, match=f"{tmp_path}/export/method.safetensors does not exist. Train that run to its"
    ):
        load_encoder(made(0), tmp_path)


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"0123456789 not tensors")
    with pytest.raises(CheckpointError, match="x.safetensors cannot be read as safetensors"):
        load_encoder(made(0), tmp_path / "x.safetensors")


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    tensors = made(1).backbone.state_dict()
    del tensors["bn1.weight"], tensors["layer1.0.bn2.bias"]
    tensors["more"] = torch.ones(1)
    tensors["bn1.bias"] = torch.ones(7)
    before = made(0)
    ours = made(0)
    with pytest.raises(ConfigError) as err:
        load_encoder(ours, write(tmp_path / "b.safetensors", tensors))
    assert "b.safetensors does not fit this encoder: it lacks backbone.bn1.weight, backbone.layer1.0.bn2.bias; " in str(
        err.value
    )
    assert "it also holds backbone.more; it has other shapes of backbone.bn1.bias.\n" in str(err.value)
    assert same(ours, before)


def test_long_lists_of_tensors_are_cut(tmp_path):
    with pytest.raises(ConfigError, match=r"lacks [^,]+, [^,]+, \S+ and \d+ more; it also holds backbone.x\."):
        load_encoder(made(0), write(tmp_path / "b.safetensors", {"x": torch.ones(1)}))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"stem_padding": 2}, r"model.stem_padding 1 \(here 2\)"),
        ({"stem_stride": 2, "widths": (4, 4, 6, 10)}, r"model.stem_stride 1 \(here 2\), model.widths \[4, 4, 6, 8\]"),
    ],
)
def test_other_network_is_refused_even_if_every_shape_fits(tmp_path, setting, words):
    file = write(tmp_path / "b.safetensors", made(1).backbone.state_dict())
    with pytest.raises(ConfigError, match=f"was trained with {words}.*Give this run the same model section"):
        load_encoder(made(0, BackboneConfig(**SMALL | setting)), file)


def test_how_batch_norm_is_shared_does_not_matter(tmp_path):
    file = write(tmp_path / "b.safetensors", made(1).backbone.state_dict())
    encoder = made(0, BackboneConfig(**SMALL, batch_norm="local", views_together=True))
    load_encoder(encoder, file)
    for loaded, stored in zip(encoder.backbone.parameters(), made(1).backbone.parameters(), strict=True):
        assert torch.equal(loaded, stored)


def test_file_without_a_target_branch_says_so(tmp_path):
    with pytest.raises(ConfigError, match="has no target branch: methods with a momentum target"):
        load_encoder(made(0), write(tmp_path / "b.safetensors", named("encoder.", made(1))), branch="target")


def test_empty_encoder_that_settings_are_checked_around_needs_no_file(tmp_path):
    load_encoder(torch.nn.Identity(), tmp_path / "not yet")
