"""The attack that knows the defense: its codec is exact, its gradient passes, its band is kept, and it is stronger."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from poisons.diffusion.photos import make, picture, pictures

from poisonshield.poisons.diffusion.attack.band import cosines, low_pass, share_within
from poisonshield.poisons.diffusion.attack.canvas import Canvas
from poisonshield.poisons.diffusion.attack.eot import Transform
from poisonshield.random import KeyedRandom

IDS = torch.arange(2)


def changes(names, *, qualities=(75,), slope="layer", seed=0):
    return Transform(names, KeyedRandom(seed, IDS), qualities=qualities, slope=slope, sigma=(0.5, 1.5))


@pytest.mark.parametrize("quality", [95, 75, 50])
@pytest.mark.parametrize("size", [(64, 64), (37, 51)])
def test_the_codec_gives_pillows_pixels(quality, size):
    pixels = torch.stack([picture(i, size) for i in range(2)])
    ours = (changes(("jpeg",), qualities=(quality,))(pixels.float() / 255) * 255).round().to(torch.uint8)
    for image, found in zip(pixels, ours, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=quality)
        with Image.open(io.BytesIO(file.getvalue())) as read:
            assert np.array_equal(np.array(read), found.permute(1, 2, 0).numpy())


def test_the_gradient_goes_straight_through_or_through_all_but_the_rounding():
    x = torch.stack([picture(i) for i in range(2)]).float().div(255)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    grads = {}
    for slope in ("identity", "layer"):
        leaf = x.clone().requires_grad_()
        (changes(("jpeg",), slope=slope)(leaf) * weight).sum().backward()
        grads[slope] = leaf.grad
    assert torch.allclose(grads["identity"], weight, atol=1e-6)
    assert grads["layer"].isfinite().all()
    # 4:2:0 halves colours only, so a grey change passes whole: <J'w, grey> = <w, J grey> = <w, grey>.
    assert torch.allclose(grads["layer"].sum(1), weight.sum(1), atol=1e-3)


def test_changes_are_drawn_by_key_and_repeat_in_a_view():
    x = torch.stack([picture(i) for i in range(2)]).float().div(255)
    for name in ("jpeg", "blur", "flip"):
        made = [changes((name,), qualities=(10, 95), seed=s)(x) for s in (0, 0, 1, 2, 3)]
        assert torch.equal(made[0], made[1]) and any(not torch.equal(made[0], m) for m in made[2:])
    flipped = [changes(("flip",), seed=s)(x) for s in range(8)]
    rows = [int(torch.equal(f[i], x[i].flip(-1))) + 2 * int(torch.equal(f[i], x[i])) for f in flipped for i in (0, 1)]
    assert set(rows) == {1, 2}


def test_the_blur_is_a_gaussian_of_its_width():
    x = torch.zeros(2, 3, 15, 15)
    x[:, :, 7, 7] = 1.0
    spread = changes(("blur",))(x)[0, 0].double()
    sigma = 0.5 + float(KeyedRandom(0, IDS).uniform("eot blur", 1)[0, 0])
    taps = np.exp(-(np.arange(-3, 4) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    assert np.allclose(spread[4:11, 4:11].numpy(), np.outer(taps, taps), atol=1e-6)
    assert float(spread.sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_low_band_is_that_of_the_cosine_transform():
    x = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low = low_pass(x, 3)
    for top in (0, 8):
        for left in (0, 8, 16):
            bins = cosines() @ low[0, 1, top : top + 8, left : left + 8] @ cosines().T
            outside = torch.ones(8, 8, dtype=torch.bool)
            outside[:3, :3] = False
            assert bins[outside].abs().max() < 1e-12
    assert torch.allclose(low_pass(low, 3), low) and torch.allclose(low_pass(x, 8), x)


def test_a_banded_attack_stays_in_its_band(fitted):
    images = {"a": picture(0), "b": picture(1, (30, 27))}
    poison = make("adaptive_szt", fitted, band=2, steps=5)
    for key, source in images.items():
        canvas = Canvas(poison, {key: source}, None)
        canvas.start()
        for _ in range(5):
            canvas.advance(5)
        whole = canvas.delta[:, :, : source.shape[1] // 8 * 8, : source.shape[2] // 8 * 8]
        inside = share_within(whole, 2)
        out = canvas.released()[key]
        rounded = share_within((out.double() - source.double())[None], 2)
        print(f"{key}: share of energy in the band {inside:.4f}, on the file {rounded:.4f}")
        assert inside > 0.98 and rounded > 0.95
        assert 0 < (out.int() - source.int()).abs().max() <= 8


def test_the_adaptive_attack_survives_what_defeats_the_plain_one(fitted):
    """Loss on pictures compressed at quality 75, timesteps from 500: the defense's view of the poison."""
    images = pictures()
    judge = make("advdm", fitted, eot=("jpeg",), jpeg_qualities=(75,), t_range=(500, 1000))
    before, gains = judge.measure(images), {}
    for name in ("advdm", "adaptive_szt"):
        after = judge.measure(make(name, fitted, steps=20).perturb(images))
        gains[name] = sum(after[k] - before[k] for k in images) / len(images)
    print(f"mean rise of the loss after JPEG 75, t >= 500: {gains}, from {sum(before.values()) / 3:.4f}")
    assert gains["adaptive_szt"] >= gains["advdm"] and gains["adaptive_szt"] > 0


def test_a_mask_weighs_the_adaptive_loss_and_frees_the_pixels(fitted):
    images, mask = pictures(1), torch.zeros(1, 32, 32)
    mask[:, 12:20, 12:20] = 1
    poison = make("adaptive_szt", fitted, steps=5, draws=2)
    out = poison.perturb(images, masks={"k0": mask})["k0"]
    change = (out.int() - images["k0"].int()).abs().amax(0)
    assert change[mask[0] == 0].max() > 0
    measured = [poison.measure({"k0": x}, masks={"k0": mask})["k0"] for x in (images["k0"], out)]
    print(f"masked loss {measured}")
    assert measured[1] > measured[0]
