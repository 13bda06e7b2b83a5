"""Generated and real pictures beside each other in the latents of the pipeline that drew them."""

from typing import Any

import torch
from torch import Tensor

from poisonshield.evals.base import Number
from poisonshield.evals.diffusion.base import LearnedWord, WordEvaluation
from poisonshield.evals.diffusion.parts.similarity import cosine
from poisonshield.models.diffusion.pipeline import LatentDiffusion


class LatentCosine(WordEvaluation):
    """How alike the pictures and real ones are in the pipeline's latents."""

    name = "latent_cosine"
    place = 30
    numbers = (Number("latent_cosine", "latent cosine", better="higher", column="always", effect=4),)

    def __call__(self, subject: LearnedWord) -> dict[str, Any]:
        """None where the real pictures have another size."""
        same = subject.references.shape[1:] == subject.x.shape[1:]
        return {"latent_cosine": latent_cosine(subject.model, subject.x, subject.references) if same else None}


@torch.no_grad()
def latent_cosine(model: LatentDiffusion, x: Tensor, references: Tensor, *, micro_batch: int = 16) -> float:
    """Mean cosine over pairs of pictures in the pipeline's own latents (posterior means)."""
    device = model.alphas_cumprod.device
    h, g = (
        torch.cat([model.encode(part.to(device)).flatten(1) for part in v.split(micro_batch)]) for v in (x, references)
    )
    return cosine(h, g)
