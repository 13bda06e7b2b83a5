"""What a step of textual inversion does beside its networks: few operations, and the same numbers."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from poisonshield.batch import Batch
from poisonshield.losses import zone
from poisonshield.losses.zone import Zone, latent_mask
from poisonshield.methods.diffusion.textual_inversion import TextualInversion
from poisonshield.models.diffusion.draws import draw_together
from poisonshield.random import KeyedRandom

MOST = 330
"""Operations beside U-Net, VAE and text encoder; about 190 of them draw the random numbers."""


def made_batch():
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 2:9, 4:12] = 1
    captions = ("a photo of a <ringx>",) * 2
    return Batch(("ring/0", "ring/1"), x, y=torch.zeros(2, dtype=torch.int64), captions=captions, mask=mask)


class Counting(TorchDispatchMode):
    """Operations outside of the modules given."""

    def __init__(self, *modules):
        super().__init__()
        self.names, self.depth = Counter(), 0
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self._enter(1))
            module.register_forward_hook(lambda *_: self._enter(-1))

    def _enter(self, by):
        self.depth += by

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.depth == 0:
            self.names[func.name()] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("vae", ["mean", "sample"])
def test_a_step_does_little_beside_its_networks(vae):
    model = tiny_model()
    config = TextualInversion.Config(init="star", vae=vae)
    method = TextualInversion(config, model=model, tokens={"ring": "<ringx>"}, seed=0)
    method.zone = Zone()
    method(made_batch())  # latents and tokens are kept from now on
    with Counting(model.unet, model.text_encoder) as counting:
        method(made_batch())
    assert sum(counting.names.values()) <= MOST, counting.names


def test_the_precision_of_a_pipeline_is_known_without_a_look_at_every_weight():
    """diffusers' own property goes through all of them, a millisecond, and a step asked twice."""
    model, seen = tiny_model(), []
    whole = model.unet.named_parameters

    def watched(*args, **kwargs):
        for name, parameter in whole(*args, **kwargs):
            seen.append(name)
            yield name, parameter

    model.unet.named_parameters = watched
    assert model.dtype == torch.float32 and len(seen) == 1


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_numbers_drawn_together_are_those_drawn_alone(rows, count):
    rng = KeyedRandom(-3, torch.tensor([5, 2**40, -7])[:rows], 9, "scope")
    together = draw_together(rng, ("t", "u"), ("noise", "posterior"), count)
    assert list(together) == ["t", "u", "noise", "posterior"]
    for purpose in ("t", "u"):
        assert torch.equal(together[purpose], rng.uniform(purpose, 1))
    for purpose in ("noise", "posterior"):
        assert torch.equal(together[purpose], rng.normal(purpose, count))


def test_nothing_is_drawn_for_no_samples():
    rng = KeyedRandom(0, torch.zeros(0, dtype=torch.int64))
    assert {k: tuple(v.shape) for k, v in draw_together(rng, ("t",), ("noise",), 5).items()} == {
        "t": (0, 1),
        "noise": (0, 5),
    }


@pytest.mark.parametrize("side", [8, 4, 2])
def test_a_mask_of_whole_pixels_shrinks_as_any_other(side, monkeypatch):
    """By a mean over cells; the same to the bit for masks of 0 and 1."""
    soft = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = Zone(dilate=0)
    ours = [latent_mask(m, (side, side), settings) for m in ((soft > 0.5).float(), soft)]
    rows = zone._overlap(16, side).float()
    slow = [(rows @ m @ rows.T) * (side * side / 256) for m in ((soft > 0.5).float(), soft)]
    assert torch.equal(ours[0], slow[0]) and torch.equal(ours[0], F.adaptive_avg_pool2d((soft > 0.5).float(), side))
    torch.testing.assert_close(ours[1], slow[1], rtol=1e-6, atol=0)
