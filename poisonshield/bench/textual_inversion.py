"""A step of textual inversion as diffusers' example script takes it, written anew from its documentation.

The picture goes through the VAE at every step, the whole table of token vectors is a parameter of AdamW, and after each
step all rows but the new ones are put back. Networks are frozen and shared with our side. Not here: accelerate, logging
and the loader, so that the arithmetic is what is compared.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poisonshield.batch import Batch
from poisonshield.bench.harness import WrongResult
from poisonshield.methods.diffusion.textual_inversion import TextualInversion
from poisonshield.models.diffusion.pipeline import LatentDiffusion

_LR = 2e-3  # configs/invert/diffusers.yaml


@dataclass(frozen=True)
class Draws:
    """What is random in a step: of the VAE's posterior, the noise, the timesteps."""

    posterior: Tensor
    noise: Tensor
    t: Tensor


class UsualLoop:
    """The loop over the batches of one concept; `model` is a copy of its own, whose text encoder gets a new table."""

    def __init__(self, model: LatentDiffusion, method: TextualInversion, batches: list[Batch]) -> None:
        self.model, self.batches, self.turn = model, batches, itertools.cycle(batches)
        self.table = _widened(model, method)
        self.old = self.table.weight.detach()[: model.vocabulary].clone()
        self.ids = {caption: method.model.tokens([caption]) for b in batches for caption in b.all_captions()}
        self.optimizer = torch.optim.AdamW(self.table.parameters(), lr=_LR)

    def step(self) -> None:
        """One step: loss, backward, AdamW, old rows put back."""
        batch = next(self.turn)
        self.loss(batch, self.draw(batch)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table.weight[: len(self.old)] = self.old

    def draw(self, batch: Batch) -> Draws:
        """Random numbers of torch's own generator."""
        x, model = batch.pixels(), self.model
        shape = (len(x), model.latent_channels, *(s // model.factor for s in x.shape[2:]))
        posterior, noise = (torch.randn(shape, device=x.device) for _ in range(2))
        return Draws(posterior, noise, torch.randint(0, model.num_timesteps, (len(x),), device=x.device))

    def loss(self, batch: Batch, draws: Draws) -> Tensor:
        """The mean square of the prediction's error."""
        model = self.model
        posterior = model.vae.encode(batch.pixels() * 2 - 1).latent_dist
        z = ((posterior.mean + posterior.std * draws.posterior) * model.vae.config.scaling_factor).detach()
        noisy = model.scheduler.add_noise(z, draws.noise, draws.t)
        context = model.text_encoder(torch.cat([self.ids[c] for c in batch.all_captions()]))[0]
        pred = model.unet(noisy, draws.t, encoder_hidden_states=context).sample
        if model.prediction_type == "v":
            return F.mse_loss(pred, model.scheduler.get_velocity(z, draws.noise, draws.t))
        return F.mse_loss(pred, draws.noise)

    def gradient(self, batch: Batch, draws: Draws) -> Tensor:
        """Of the new rows, [k, d]."""
        return torch.autograd.grad(self.loss(batch, draws), self.table.weight)[0][len(self.old) :]


def check_loop(loop: UsualLoop, method: TextualInversion) -> str:
    """Raises WrongResult unless the loop has our gradient for the same random numbers, and moves nothing but new rows.

    method: of the preset `diffusers`, which takes the same step."""
    batch = loop.batches[0]
    ours = torch.autograd.grad(method(batch).loss, method.vectors)[0]
    theirs = loop.gradient(batch, _our_draws(loop, method, batch))
    far = float((theirs - ours).norm() / ours.norm())
    if not far <= 1e-3:
        raise WrongResult(f"gradients differ by {far:.1g} of their norm: not diffusers' step.")
    before = loop.table.weight.detach().clone()
    loop.step()
    moved = (loop.table.weight.detach() != before).any(1)
    if bool(moved[: len(loop.old)].any()) or not bool(moved[len(loop.old) :].all()):
        raise WrongResult("the usual loop moved rows of the vocabulary, or left a new one where it was.")
    return f"gradient of our preset diffusers within {far:.0e}"


def _our_draws(loop: UsualLoop, method: TextualInversion, batch: Batch) -> Draws:
    x = batch.pixels()
    like, rng = loop.draw(batch).noise, batch.random(method.seed, x.device)
    normal = lambda purpose: rng.normal(purpose, like[0].numel()).view_as(like)
    return Draws(normal("posterior"), normal("noise"), method.timesteps(batch))


def _widened(model: LatentDiffusion, method: TextualInversion) -> nn.Embedding:
    """The text encoder's table with the new words' rows behind the vocabulary; the only parameter that learns."""
    old = model.text_encoder.get_input_embeddings().weight.detach()
    rows = torch.cat([old[: model.vocabulary], method.vectors.detach().to(old)])
    table = nn.Embedding.from_pretrained(rows.clone(), freeze=False)
    model.text_encoder.set_input_embeddings(table)
    return table
