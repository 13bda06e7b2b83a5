"""Perturbation-induced linearisation: noise against a linear classifier, which needs no network and a minute.

A linear classifier h is trained on the clean pictures. Noise n takes sign steps down
w CE(h(n), y) + (1 - w) KL(uniform || softmax h(x - n)), and x - n is released: the picture has lost what h read off
it, and the noise carries the class. Source: the authors' code of 2601.19967.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from poisonshield.config import Pixels
from poisonshield.poisons.learned.base import LearnedConfig, LearnedPoison
from poisonshield.poisons.learned.pictures import Pictures
from poisonshield.poisons.learned.progress import Progress


class PIL(LearnedPoison):
    """Subtracts noise that a linear classifier takes for the class, and that blinds it to the picture."""

    class Config(LearnedConfig):
        """The linear classifier, and the steps."""

        epochs: int = Field(30, ge=1, description="passes of the linear classifier over the pictures")
        lr: float = Field(0.003, gt=0, description="its learning rate at first, which falls to 0 by a cosine")
        momentum: float = Field(0.9, ge=0, lt=1, description="its momentum")
        batch_size: int = Field(512, ge=1, description="pictures of a step")
        steps: int = Field(30, ge=1, description="sign steps of each picture")
        step_size: Pixels | None = Field(
            None, gt=0, description="length of a sign step, in pixel units; null is eps / 10"
        )
        class_weight: float = Field(0.9, ge=0, le=1, description="w, the weight of the noise's own class")

    name = "pil"
    source = "2601.19967"
    config: Config

    def learn(self, pictures: Pictures, progress: Progress) -> None:
        """The classifier, then the noise of all pictures. So short that nothing is kept for going on."""
        weight = self._train_linear(pictures)
        for rows in pictures.in_turn(self.config.batch_size):
            x, y = pictures.read(rows)
            u = pictures.random(rows, self.seed, 0, "pil").uniform("start", x[0].numel()).view_as(x)
            noise = self.descend(weight, x, y, self.config.eps * (2 * u - 1))
            self.table[rows] = self.levels((x - noise).clamp(0, 1) - x)

    def _train_linear(self, pictures: Pictures) -> Tensor:
        """The classifier as one matrix [K, 3 H W]; trained as a product of two, as the authors do."""
        c, length = self.config, pictures.levels[0].numel()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed % 2**63)
            layers = [nn.Linear(n, self.num_classes, bias=False) for n in (length, self.num_classes)]
        net = nn.Sequential(nn.Flatten(), *layers).to(self.device)
        optimizer = torch.optim.SGD(net.parameters(), c.lr, c.momentum)
        for epoch in range(c.epochs):
            for group in optimizer.param_groups:
                group["lr"] = c.lr * (1 + math.cos(math.pi * epoch / c.epochs)) / 2
            steps = -(-len(pictures) // c.batch_size)
            for step in range(epoch * steps, (epoch + 1) * steps):
                x, y = pictures.read(pictures.shuffled(c.batch_size, self.seed, step))
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        return (layers[1].weight @ layers[0].weight).detach()

    @torch.no_grad()
    def descend(self, weight: Tensor, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """The noise [B, 3, H, W] after all steps. weight [K, 3 H W]. A linear model's gradients are written out."""
        c = self.config
        size, one = c.step_size or c.eps / 10, F.one_hot(y, self.num_classes)
        for _ in range(c.steps):
            of_noise = (noise.flatten(1) @ weight.T).softmax(1) - one  # d CE(h(n), y) / d h(n)
            # d KL(uniform || softmax s) / ds is softmax s - 1 / K, and s = h(x - n) turns the sign.
            of_rest = ((x - noise).flatten(1) @ weight.T).softmax(1) - 1 / self.num_classes
            grad = (c.class_weight * of_noise - (1 - c.class_weight) * of_rest) @ weight
            noise = (noise - size * grad.view_as(noise).sign()).clamp(-c.eps, c.eps)
        return noise
