"""Pictures and quick settings for the tests of diffusion poisons."""

import torch

from poisonshield import world
from poisonshield.registry import Registry

POISONS = Registry("poisonshield.poisons.diffusion", kind="diffusion poison")

QUICK = {"surrogate_steps": 2, "pgd_steps": 2, "inner_steps": 1}
"""The most that a test has patience for, of settings that say how long a surrogate is trained."""


def quick(cls) -> dict[str, float]:
    """Settings that make a poison small enough for a test, whichever it is: nothing for those without a surrogate."""
    fields = cls.Config.model_fields
    lengths = {name: min(most, fields[name].default) for name, most in QUICK.items() if name in fields}
    return lengths | ({"lr": 1e-3} if "lr" in fields else {})


def picture(index: int, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    """The middle of a rendered picture, uint8 [3, H, W]."""
    x = world.render(index).x
    if max(size) > world.SIZE:
        x = torch.nn.functional.interpolate(x[None], (128, 128), mode="bilinear", antialias=True)[0]
    top, left = ((have - want) // 2 for have, want in zip(x.shape[1:], size, strict=True))
    return (x[:, top : top + size[0], left : left + size[1]] * 255).round().to(torch.uint8)


def pictures(count: int = 3, size: tuple[int, int] = (32, 32)) -> dict[str, torch.Tensor]:
    return {f"k{i}": picture(i, size) for i in range(count)}


def make(name: str, model, *, seed: int = 0, target=None, **settings):
    """A poison by name; methods with a surrogate train it for a moment only."""
    cls = POISONS.get(name)
    given = {} if target is None else {"target": target}
    return cls(cls.Config(**{**quick(cls), **settings}), model=model, seed=seed, **given)


def settle(model):
    """Latents as a trained VAE has them: of variance 1, with little posterior noise. Random ones have mostly noise."""
    with torch.no_grad():
        model.vae.quant_conv.bias[model.latent_channels :].fill_(-6.0)
        mean, _ = model.posterior(torch.stack([picture(i, (32, 32)).float() / 255 for i in range(8)]))
    model.vae.register_to_config(scaling_factor=float(1 / mean.std()))
    return model
