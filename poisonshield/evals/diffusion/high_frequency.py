"""How much of the pictures is fine detail, which a poison that was learned along adds to."""

from typing import Any

import torch
from torch import Tensor

from poisonshield.evals.base import Number
from poisonshield.evals.diffusion.base import LearnedWord, WordEvaluation


class HighFrequency(WordEvaluation):
    """The share of the pictures' energy in high frequencies."""

    name = "high_frequency"
    place = 40
    numbers = (Number("high_frequency", "high frequencies", column="always"),)

    def __call__(self, subject: LearnedWord) -> dict[str, Any]:
        """Mean over the pictures."""
        return {"high_frequency": float(high_frequency(subject.x).mean())}


def high_frequency(x: Tensor, *, above: float = 0.25) -> Tensor:
    """Share [N] in [0, 1] of the energy about the mean of pictures [N, C, H, W] above `above` of the Nyquist frequency.

    Frequencies are radial; channels are added. A flat picture has 0. Poisoned outputs have more than clean ones,
    blurred ones less: compare with pictures that clean training gave.
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
