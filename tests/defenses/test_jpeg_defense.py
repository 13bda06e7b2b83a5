"""The JPEG defense equals saving and loading, and touches pixels alone."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, features
from tiny import tiny_batch

from poisonshield.defenses.base import Context
from poisonshield.defenses.jpeg import JPEG
from poisonshield.runs import read_experiment


@pytest.mark.skipif(not features.check("libjpeg_turbo"), reason="Pillow's codec is not libjpeg-turbo")
@pytest.mark.parametrize(("subsampling", "pillow"), [("420", 2), ("444", 0)])
def test_equals_saving_and_loading(subsampling, pillow):
    batch = tiny_batch()
    pixels = (batch.x * 255).round().to(torch.uint8)
    batch = batch.replace(x=pixels / 255)
    defense = JPEG(JPEG.Config(quality=30, subsampling=subsampling), Context(0, 4))
    after = defense.before(batch)
    assert after.keys == batch.keys and torch.equal(after.y, batch.y)
    for ours, image in zip(after.x, pixels, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=30, subsampling=pillow)
        loaded = torch.from_numpy(np.asarray(Image.open(buffer).convert("RGB")).copy()).permute(2, 0, 1)
        assert torch.equal(ours, loaded / 255)
    assert not torch.equal(after.x, batch.x)


def test_its_configuration_is_read():
    run = read_experiment("configs/defend/jpeg_cifar10_mini.yaml", [])
    assert [d.config.quality for d in run.defenses] == [10]
