"""Textual inversion on one page: a new word for a frozen pipeline, learned from five pictures. Gal et al. 2022.

    python launch/examples/textual_inversion.py --steps 50 --out yellow_ring.safetensors

The shipped pipeline `tiny` never saw a yellow ring; here <ring-thing> becomes the word for it. Prints the denoising
loss on pictures that were not trained on, with the word as it started and as it was learned.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.models.diffusion.embeddings import Learned, save_embedding
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.world.rendered import rendered_concepts

WORD, PROMPT = "<ring-thing>", "a photo of a <ring-thing>"


def latents(model: LatentDiffusion, *, seed: int) -> Tensor:
    """z [5, 4, 16, 16] of five pictures of a yellow ring."""
    (concept,) = rendered_concepts(5, seed=seed, kinds=[("yellow", "ring")])
    x = torch.stack([image.pixels for image in concept.images]).float() / 255  # [5, 3, 64, 64] in [0, 1]
    with torch.no_grad():
        return model.encode(x)


def denoising_loss(model: LatentDiffusion, vectors: Tensor, z: Tensor, *, generator: torch.Generator) -> Tensor:
    """How badly the pipeline guesses the noise in z [B, C, h, w] when it is told the word; timesteps from 500 on."""
    t = torch.randint(500, model.num_timesteps, (len(z),), generator=generator)  # high ones, as Safe-Zone Training
    noise = torch.randn(z.shape, generator=generator)
    context = model.prompts([PROMPT], vectors).expand(len(z), -1, -1)
    prediction = model.predict(model.noised(z, t, noise), t, context)
    return F.mse_loss(prediction, model.target(z, t, noise))


def main() -> None:
    """Learn the word, tell, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--start", default="circle", help="a word of the pipeline that is near")
    parser.add_argument("--out", type=Path, help="file for the word, .safetensors as diffusers reads it")
    options = parser.parse_args()

    model = LatentDiffusion.load("tiny")
    model.add_placeholder(WORD)
    vectors = model.word_vector(options.start)[None].requires_grad_()  # [1, d], the only thing that learns
    z, unseen = latents(model, seed=1), latents(model, seed=2).repeat(20, 1, 1, 1)

    def loss_on_unseen() -> float:
        with torch.no_grad():
            return denoising_loss(model, vectors, unseen, generator=torch.Generator().manual_seed(1)).item()

    before, generator = loss_on_unseen(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([vectors], lr=0.02)
    for _ in range(options.steps):
        optimizer.zero_grad()
        denoising_loss(model, vectors, z, generator=generator).backward()
        optimizer.step()
    print(f"loss on unseen pictures: {before:.4f} as {options.start!r}, {loss_on_unseen():.4f} as {WORD}")
    if options.out is not None:
        save_embedding(Learned(WORD, vectors), options.out)
        print(f"{WORD} is in {options.out}")


if __name__ == "__main__":
    main()
