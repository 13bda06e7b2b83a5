"""Class-wise separable noise: the half of transferable unlearnable examples that needs no network.

Each batch's noise takes sign steps down CSD = mean over pairs of classes of (s_i + s_j) / ||c_i - c_j||, c_k being the
mean of a class's noise and s_k the mean distance to it. The authors' settings for SimCLR weigh the self-supervised
loss with 0, so this is all that is left of them. Source: Ren et al. 2022 (2210.10114).
"""

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.config import Pixels
from poisonshield.poisons.learned.base import LearnedConfig, LearnedPoison
from poisonshield.poisons.learned.pictures import Pictures
from poisonshield.poisons.learned.progress import Progress

TINY = 1e-5


class TUECSD(LearnedPoison):
    """Noise whose classes lie close together and far from each other, for each picture; no network is trained."""

    class Config(LearnedConfig):
        """How far, how often, and what moves."""

        epochs: int = Field(40, ge=1, description="passes over the pictures")
        steps: int = Field(20, ge=1, description="sign steps of a batch in a pass")
        step_size: Pixels = Field(0.8 / 255, gt=0, description="length of a sign step, in pixel units")
        batch_size: int = Field(512, ge=2, description="pictures whose classes are told apart together")
        through_spread: bool = Field(
            False, description="whether s_k is differentiated too; the authors' code takes it for a constant"
        )

    name = "tue_csd"
    source = "2210.10114"
    config: Config

    def learn(self, pictures: Pictures, progress: Progress) -> None:
        """Passes over shuffled batches, from a random start."""
        c = self.config
        place, tensors = progress.load()
        if tensors:
            self.table.copy_(tensors["table"])
        else:
            self._start(pictures)
        batches = -(-len(pictures) // c.batch_size)
        for epoch in range(place.get("epoch", 0), c.epochs):
            for step in range(epoch * batches, (epoch + 1) * batches):
                rows = pictures.shuffled(c.batch_size, self.seed, step)
                x, y = pictures.read(rows)
                self.table[rows] = self.levels(self.descend(x, y, self.of_rows(rows, y)))
            if progress.due() or epoch + 1 == c.epochs:
                progress.save({"epoch": epoch + 1}, {"table": self.table})

    def _start(self, pictures: Pictures) -> None:
        for rows in pictures.in_turn(self.config.batch_size):
            x, _ = pictures.read(rows)
            u = pictures.random(rows, self.seed, 0, "tue_csd").uniform("start", x[0].numel()).view_as(x)
            self.table[rows] = self.levels((x + self.config.eps * (2 * u - 1)).clamp(0, 1) - x)

    def descend(self, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        """delta [B, 3, H, W] after the steps of one pass; a batch of one class has nothing to tell apart and stays."""
        c = self.config
        for _ in range(c.steps if bool((y != y[0]).any()) else 0):
            leaf = delta.detach().requires_grad_()
            (grad,) = torch.autograd.grad(measure_csd(leaf, y, through_spread=c.through_spread), leaf)
            delta = (delta - c.step_size * grad.sign()).clamp(-c.eps, c.eps)
            delta = (x + delta).clamp(0, 1) - x
        return delta


def measure_csd(delta: Tensor, y: Tensor, *, through_spread: bool) -> Tensor:
    """CSD of the classes that are there, a scalar. delta [B, ...], y int64 [B]."""
    flat, (_, at) = delta.flatten(1), y.unique(return_inverse=True)
    member = torch.nn.functional.one_hot(at).to(flat.dtype)  # [B, k]
    counts = member.sum(0)
    centres = member.T @ flat / counts[:, None]  # [k, D]
    spread = member.T @ (flat - centres[at]).norm(dim=1) / counts
    if not through_spread:
        spread = spread.detach()
    first, second = torch.triu_indices(len(counts), len(counts), 1, device=y.device)
    apart = (centres[first] - centres[second]).norm(dim=1)
    return ((spread[first] + spread[second] + TINY) / (apart + TINY)).mean()
