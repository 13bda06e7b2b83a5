"""The numbers of one learned word: what its pictures show beside clean pictures of the concept.

For the rendered world the judge that lies beside the pipeline says whether the concept is there; without it that number
is missing, never guessed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield.build_diffusion import RENDERED, InvertRun
from poisonshield.data import world
from poisonshield.data.concepts import Concept
from poisonshield.methods.diffusion.textual_inversion import TextualInversion
from poisonshield.models.judge import ConceptJudge
from poisonshield.models.latent_diffusion import TINY, LatentDiffusion

JUDGE = "judge.safetensors"
_REFERENCE_SEED = 2  # of renders that neither a pipeline nor a word was trained on


def measure(run: InvertRun, method: TextualInversion, clean: Concept, pictures: dict[str, Tensor]) -> dict[str, Any]:
    """A row's numbers, of the `recon` pictures [N, 3, H, W]. None where a number does not apply.

    fidelity, shown: the judge's mean probability and the percentage of pictures above one half.
    """
    x = pictures["recon"]
    values: dict[str, Any] = {"fidelity": None, "shown": None}
    judge = judge_of(run.settings.model.pipeline)
    if judge is not None and run.settings.data.train == RENDERED:
        color, _, shape = clean.name.partition("_")
        seen = judge.fidelity(x, color, shape)
        values |= {"fidelity": round(seen["joint"], 4), "shown": round(100 * seen["share"], 2)}
    return values


def judge_of(pipeline: str) -> ConceptJudge | None:
    """The judge beside a pipeline's parts, or None."""
    path = (TINY if pipeline == "tiny" else Path(pipeline)) / JUDGE
    return ConceptJudge.load(path) if path.is_file() else None


def references(run: InvertRun, concept: Concept) -> Tensor:
    """Clean pictures [N, 3, H, W] to compare with: fresh ones of a rendered concept, else the concept's own."""
    if run.settings.data.train == RENDERED:
        kind = tuple(concept.name.split("_"))
        made = [world.render(i, seed=_REFERENCE_SEED, only=[kind]).x for i in range(run.settings.generate.references)]
        return torch.stack(made)
    return torch.stack([image.pixels for image in concept.images]).float() / 255


@torch.no_grad()
def latents(model: LatentDiffusion, x: Tensor) -> Tensor:
    """Flattened latents [N, D] of pictures."""
    return torch.cat([model.encode(part).flatten(1) for part in x.to(model.alphas_cumprod.device).split(16)])
