"""Contrastive poisoning: noise that makes a self-supervised loss small, so that it teaches nothing about pictures.

Encoder and noise take turns down SimCLR's loss of two views of x + delta, gradients going through the augmentation.
By class it carries labels and poisons supervised training too; by sample it hurts self-supervision most, and is
stronger when it starts at the noise by class. Source: He et al. 2023 (2202.11202).
"""

import logging
import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.attacks import frozen_stats
from poisonshield.models.batchnorm import input_gradients_only
from poisonshield.poisons.learned.base import LearnedConfig, LearnedPoison
from poisonshield.poisons.learned.contrast import Contrast, ContrastConfig
from poisonshield.poisons.learned.pictures import Pictures
from poisonshield.poisons.learned.progress import Progress
from poisonshield.random import KeyedRandom, philox_uniform, stream_of

log = logging.getLogger(__name__)


class CP(LearnedPoison):
    """Noise that makes SimCLR's loss small, for each picture or for each class, learned beside an encoder."""

    class Config(LearnedConfig):
        """For whom, how long, and how far."""

        per: Literal["sample", "class"] = Field("class", description="whether each picture has its noise or a class")
        epochs: int | None = Field(None, ge=1, description="null is 200 by sample, 1000 by class")
        turn: int | None = Field(
            None, ge=1, description="batches of a turn; null is all of an epoch by sample, 20 by class"
        )
        steps: int | None = Field(None, ge=1, description="sign steps of a batch; null is 5 by sample, 1 by class")
        step_share: float = Field(0.1, gt=0, le=1, description="length of a sign step, as a share of eps")
        warmup: int = Field(10, ge=0, description="epochs over which the learning rate rises")
        surrogate: ContrastConfig = Field(ContrastConfig(), description="the encoder that learns beside the noise")

    name = "cp"
    source = "2202.11202"
    grain: ClassVar[Literal["sample", "class"]] = "class"
    config: Config

    def __init__(self, config: Config, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(config, num_classes=num_classes, image_size=image_size, seed=seed)
        self.grain = config.per  # type: ignore[misc]
        by_sample = config.per == "sample"
        self.epochs = config.epochs or (200 if by_sample else 1000)
        self.steps = config.steps or (5 if by_sample else 1)
        self.noise = torch.zeros(0)  # [K, 3, H, W] of classes, in pixel units, not rounded

    def learn(self, pictures: Pictures, progress: Progress) -> None:
        """Turns of the encoder and the noise, epoch by epoch."""
        net = Contrast(self.config.surrogate, num_classes=self.num_classes, seed=self.seed, device=self.device)
        place, tensors = progress.load()
        self._begin(pictures)
        if tensors:
            net.take(tensors)
            self.table.copy_(tensors["table"])
            self.noise = tensors["noise"].to(self.device)
        batches = -(-len(pictures) // self.config.surrogate.batch_size)
        turn = self.config.turn or (batches if self.grain == "sample" else 20)
        for epoch in range(place.get("epoch", 0), self.epochs):
            for first in range(0, batches, turn):
                steps = range(epoch * batches + first, epoch * batches + min(first + turn, batches))
                for step in steps:
                    self._teach(net, pictures, step, self.rate((step + 1) / batches))
                with frozen_stats(net), input_gradients_only(net):
                    for step in steps:
                        self._move(net, pictures, step)
            log.info("%s: epoch %d of %d", self.name, epoch + 1, self.epochs)
            if progress.due() or epoch + 1 == self.epochs:
                state = {**net.tensors(), "table": self.table, "noise": self.noise}
                progress.save({"epoch": epoch + 1}, state)
        if self.grain == "class":
            self.table.copy_(self.levels(self.noise))

    def _begin(self, pictures: Pictures) -> None:
        """Uniform noise in the box."""
        eps = self.config.eps
        if self.grain == "class":
            u = philox_uniform((self.num_classes, *self.table.shape[1:]), self.seed, stream=stream_of("cp start"))
            self.noise = (eps * (2 * u - 1)).to(self.device)
            return
        for rows in pictures.in_turn(1000):
            x, _ = pictures.read(rows)
            start = pictures.random(rows, self.seed, 0, "cp").uniform("start", x[0].numel()).view_as(x)
            self.table[rows] = self.levels((x + eps * (2 * start - 1)).clamp(0, 1) - x)

    def rate(self, epochs: float) -> float:
        """What the learning rate is multiplied by after so many epochs: a line up, then a cosine to 0."""
        warmup = min(self.config.warmup, self.epochs // 2)
        if epochs <= warmup:
            return epochs / warmup
        return (1 + math.cos(math.pi * (epochs - warmup) / (self.epochs - warmup))) / 2

    def of_rows(self, rows: Tensor, y: Tensor) -> Tensor:
        """By class the noise as it is in the search."""
        return super().of_rows(rows, y) if self.grain == "sample" else self.noise[y]

    def _teach(self, net: Contrast, pictures: Pictures, step: int, rate: float) -> None:
        rows = pictures.shuffled(self.config.surrogate.batch_size, self.seed, step)
        x, y = pictures.read(rows)
        net.train()
        poisoned = (x + self.of_rows(rows, y)).clamp(0, 1)
        net.step(net.loss(poisoned, pictures.random(rows, self.seed, step, "cp/teach")), rate)

    def _move(self, net: Contrast, pictures: Pictures, step: int) -> None:
        rows = pictures.shuffled(self.config.surrogate.batch_size, self.seed, step)
        x, y = pictures.read(rows)
        delta = self.of_rows(rows, y)
        for number in range(self.steps):
            rng = pictures.random(rows, self.seed, step, f"cp/move{number}")
            if self.grain == "class":
                self.noise = self.improve(net, x, self.noise, rng, y)
            else:
                delta = self.improve(net, x, delta, rng)
        if self.grain == "sample":
            self.table[rows] = self.levels(delta)

    def improve(self, net: Contrast, x: Tensor, noise: Tensor, rng: KeyedRandom, y: Tensor | None = None) -> Tensor:
        """noise after one sign step down the loss: of each picture, clipped with it, or with y of each class."""
        leaf = noise.detach().requires_grad_()
        poisoned = (x + (leaf if y is None else leaf[y])).clamp(0, 1)
        (grad,) = torch.autograd.grad(net.loss(poisoned, rng), leaf)
        eps = self.config.eps
        moved = (noise - self.config.step_share * eps * grad.sign()).clamp(-eps, eps)
        return moved if y is not None else (x + moved).clamp(0, 1) - x
