"""Quality of pictures, with and without the ones they came from: PSNR, SSIM, spectrum, BRISQUE. No weights are fetched.

Differences are measured on the 8-bit pixels that a file holds, so that files alone reproduce every number. BRISQUE did
not rank methods in public benchmarks of protections: report it, never decide by it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.errors import ShapeError


def difference(x: Tensor, original: Tensor) -> dict[str, float | None]:
    """How far pictures [N, 3, H, W] in [0, 1] moved from their originals, both rounded to 8 bits; means over pictures.

    psnr in dB, over pictures that differ at all, None if none does; ssim in [-1, 1]; max_levels, the largest over all
    pictures, and mean_levels, of 8 bits. Raises ShapeError if shapes differ, or are under 11 pixels a side.
    """
    a, b = _levels(x), _levels(original)
    _same(a, b)
    decibels = psnr(a / 255, b / 255)
    finite = decibels[decibels.isfinite()]
    apart = (a - b).abs()
    return {
        "psnr": float(finite.mean()) if len(finite) else None,
        "ssim": float(ssim(a / 255, b / 255).mean()),
        "max_levels": float(apart.max()),
        "mean_levels": float(apart.mean()),
    }


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [N] in dB of pictures [N, 3, H, W] in [0, 1]; infinite where two are equal."""
    _same(x, y)
    return -10 * (x - y).double().square().flatten(1).mean(1).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity [N] of pictures [N, C, H, W] in [0, 1], per channel, then averaged.

    Gaussian window of 11 pixels, standard deviation 1.5, only where it fits inside. Raises ShapeError below 11 pixels.
    Source: Wang et al. 2004.
    """
    _same(x, y)
    if min(x.shape[2:]) < 11:
        raise ShapeError(f"pictures {tuple(x.shape[2:])} are smaller than SSIM's window of 11 pixels.")
    x, y = x.double(), y.double()
    line = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.double, device=x.device) / 1.5) ** 2)
    line = line / line.sum()

    def smooth(v: Tensor) -> Tensor:
        flat = v.flatten(0, 1)[:, None]
        flat = F.conv2d(F.conv2d(flat, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))
        return flat.view(*v.shape[:2], *flat.shape[2:])

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    both = smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    out = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return out.mean((1, 2, 3))


def high_frequency(x: Tensor, *, above: float = 0.25) -> Tensor:
    """Share [N] of the energy about the mean of pictures [N, C, H, W] above `above` of the Nyquist frequency, in [0, 1].

    Frequencies are radial; channels are added. A flat picture has 0. Poisoned outputs have more than clean ones, blurred
    ones less: compare with pictures that clean training gave.
    """
    side_y, side_x = x.shape[2:]
    power = torch.fft.rfft2(x.double() - x.double().mean((2, 3), keepdim=True)).abs() ** 2
    # A real picture's spectrum is stored by half: the columns between the two ends stand for two.
    weight = torch.full((side_x // 2 + 1,), 2.0, dtype=torch.double, device=x.device)
    weight[0] = 1.0
    if side_x % 2 == 0:
        weight[-1] = 1.0
    power = (power * weight).sum(1)  # [N, H, W // 2 + 1]
    fy, fx = torch.fft.fftfreq(side_y, device=x.device), torch.fft.rfftfreq(side_x, device=x.device)
    high = (fy[:, None] ** 2 + fx**2).sqrt() > above / 2
    total = power.sum((1, 2))
    return torch.where(
        total > 1e-12, (power * high).sum((1, 2)) / total.clamp(min=1e-12), torch.zeros_like(total)
    ).float()


def brisque(x: Tensor) -> dict[str, Any]:
    """BRISQUE of pictures [N, 3, H, W] in [0, 1]: {"status": "ok", "value": mean, "pictures": how many it could score}.

    Lower is nominally better. A flat picture has no score and is left out; where none has one, value is None. Without the
    package: {"status": "unavailable", "needs": ...}. Source: Mittal et al. 2012, by the `brisque` package and its model.
    """
    try:
        from brisque import BRISQUE
    except ImportError:  # the package itself, or OpenCV beneath it
        return {"status": "unavailable", "needs": "pip install poisonshield[brisque]"}
    import warnings

    class Scorer(BRISQUE):
        def scale_features(self, features: Any) -> Any:
            # Some of them are arrays of one element, which numpy 2.4 no longer takes for numbers.
            return super().scale_features([float(torch.as_tensor(f).reshape(())) for f in features])

    judge = Scorer(url=False)
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of divisions by zero in flat pictures, which end as nan below
        for picture in _levels(x).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
            values.append(float(judge.score(picture)))
    finite = [v for v in values if math.isfinite(v)]
    return {"status": "ok", "value": sum(finite) / len(finite) if finite else None, "pictures": len(finite)}


def _levels(x: Tensor) -> Tensor:
    """Pixels as a file holds them, float 0 to 255. Raises ShapeError for no picture."""
    if x.dim() != 4 or x.shape[1] != 3 or not len(x):
        raise ShapeError(f"pictures have shape {tuple(x.shape)}; [N, 3, H, W] with at least one is wanted.")
    return (x.float().clamp(0, 1) * 255).round()


def _same(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.dim() != 4:
        raise ShapeError(f"pictures {tuple(x.shape)} and {tuple(y.shape)}: two equal shapes [N, C, H, W] are wanted.")
