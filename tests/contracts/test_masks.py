"""Every mask that the folder holds, found by scanning: newcomers are tested without a line here."""

import pytest
import torch
from tiny import tiny_model

from poisonshield.batch import Batch
from poisonshield.defenses.diffusion.masks.base import MaskProvider, WordMask
from poisonshield.defenses.diffusion.szt import MASKS, SZT
from poisonshield.errors import ConfigError

NAMES = MASKS.names()


@pytest.fixture(scope="module")
def model():
    made = tiny_model()
    made.add_placeholder("<a>")
    return made


def photos():
    """Two pictures of an odd size: a bright coloured rectangle on a grey ground with some noise."""
    x = 0.4 + 0.05 * torch.rand(2, 3, 33, 26, generator=torch.Generator().manual_seed(0))
    x[:, :, 9:24, 7:19] = torch.tensor([0.9, 0.2, 0.1]).view(3, 1, 1)
    x[1, 1] = 0.8 * x[1, 1]
    return Batch(("cup/a#0", "cup/b#1"), (x * 255).round() / 255)


def made(name, batch, model, seed=0):
    """The masks by default settings; skips where they need a package that is not here."""
    provider = MASKS.get(name)(seed=seed)
    words = ["circle"] * len(batch) if provider.needs_word else None
    try:
        return provider(batch, model if provider.needs_word else None, words)
    except ConfigError as err:
        if "pip install" in str(err):
            pytest.skip(str(err))
        raise


@pytest.mark.parametrize("name", NAMES)
def test_class_is_a_mask_named_as_its_file_with_settings_that_are_described(name):
    cls = MASKS.get(name)
    assert issubclass(cls, MaskProvider) and cls.name == name and cls.__doc__
    assert all(field.description for field in cls.Config.model_fields.values())
    assert issubclass(cls, WordMask) == cls.needs_word


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_as_large_as_their_pictures_and_say_something(name, model):
    batch = photos()
    before, random = batch.x.clone(), torch.get_rng_state()
    mask = made(name, batch, model)
    assert mask.shape == (2, 1, 33, 26) and mask.is_floating_point() and not mask.requires_grad
    assert 0 <= mask.min() and mask.max() <= 1 and (0 < mask.flatten(1).mean(1)).all() and mask.mean() < 1
    assert torch.equal(batch.x, before) and torch.equal(torch.get_rng_state(), random)
    assert torch.equal(made(name, batch, model), mask)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_follows_pixels_and_key_and_not_the_batch_or_the_slot(name, model):
    batch = photos()
    whole = made(name, batch, model)
    for i, key in enumerate(("cup/a#7", "cup/b#0")):
        alone = made(name, Batch((key,), batch.x[i : i + 1]), model)
        # A network's sums may move by a bit in another batch, and a threshold lets a pixel follow.
        assert (alone[0] - whole[i]).abs().mean() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_safe_zone_training_takes_it_by_name_and_by_block(name):
    cls = MASKS.get(name)
    settings = {key: field.default for key, field in cls.Config.model_fields.items()}
    by_name, by_block = SZT.Config(mask=name), SZT.Config(mask={"name": name, **settings})
    assert by_name.mask.cls is cls and by_name == by_block
    assert SZT.Config.model_validate(by_name.model_dump()) == by_name
