"""Small pipelines for the diffusion poisons; nothing is fetched, and nothing is trained but one U-Net, briefly."""

import copy

import pytest
import torch
from poisons.diffusion.photos import picture, settle
from tiny import tiny_model


@pytest.fixture(scope="session")
def _random():
    return settle(tiny_model())


@pytest.fixture
def model(_random):
    """A random pipeline, 2 pixels a latent cell, sides multiples of 4; a test may not change it."""
    return _random


@pytest.fixture(scope="session")
def fitted(_random):
    """The same with a U-Net that learned 16 pictures for 100 steps."""
    model = copy.deepcopy(_random)
    draw = torch.Generator().manual_seed(0)
    x = torch.stack([picture(100 + i, (32, 32)).float() / 255 for i in range(16)])
    with torch.no_grad():
        z, context = model.encode(x), model.prompts(["a photo"]).expand(4, -1, -1)
    optimizer = torch.optim.AdamW(model.unet.requires_grad_(True).parameters(), lr=3e-3)
    for _ in range(100):
        rows, t = torch.randint(16, (4,), generator=draw), torch.randint(1000, (4,), generator=draw)
        noise = torch.randn(4, *z.shape[1:], generator=draw)
        pred = model.predict(model.noised(z[rows], t, noise), t, context)
        (pred - noise).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    model.unet.requires_grad_(False)
    return model
