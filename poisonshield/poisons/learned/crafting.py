"""Poisons in two parts: a surrogate is trained to the end, and then each picture is moved against it, by PGD."""

import logging
from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.attacks import PGD, Linf, Objective, frozen_stats
from poisonshield.models.batchnorm import input_gradients_only
from poisonshield.poisons.learned.base import LearnedConfig, LearnedPoison
from poisonshield.poisons.learned.pictures import Pictures
from poisonshield.poisons.learned.progress import Progress
from poisonshield.poisons.learned.surrogate import Surrogate, SurrogateConfig
from poisonshield.random import KeyedRandom

log = logging.getLogger(__name__)


class CraftConfig(LearnedConfig):
    """The surrogate's training, and the steps after it."""

    epochs: int = Field(40, ge=0, description="passes of the surrogate over the pictures")
    surrogate: SurrogateConfig = Field(SurrogateConfig(nesterov=True), description="the classifier that is attacked")
    steps: int = Field(250, ge=1, description="sign steps of each picture")
    restarts: int = Field(1, ge=1, description="starts of each picture; the one with the best loss at the end is kept")
    batch_size: int = Field(512, ge=1, description="pictures that are moved together; it changes none of them")
    padding: int = Field(
        4,
        ge=0,
        description="pixels by which pictures are shifted, and mirrored, while training and moving; 0: neither",
    )


class CraftedPoison(LearnedPoison):
    """A subclass says how the surrogate takes a training step and what each picture's loss is."""

    config: CraftConfig

    @property
    @abstractmethod
    def step_size(self) -> float:
        """Length of a sign step, in pixel units."""

    def rate(self, done: float) -> float:
        """What the learning rate is multiplied by after this share of the training: a tenth at 3/8, 5/8 and 7/8."""
        return 0.1 ** sum(done >= share for share in (3 / 8, 5 / 8, 7 / 8))

    def train_step(self, surrogate: Surrogate, x: Tensor, y: Tensor, rng: KeyedRandom, rate: float) -> None:
        """One step of the surrogate on clean pictures, shifted and mirrored."""
        surrogate.learn(shift(x, rng, self.config.padding), y, rate=rate)

    @abstractmethod
    def objective(self, surrogate: Surrogate, x: Tensor, y: Tensor) -> Tensor:
        """What the pictures ascend, a number of each, [B]."""

    def learn(self, pictures: Pictures, progress: Progress) -> None:
        """Train, then move the pictures, a batch at a time."""
        c = self.config
        surrogate = Surrogate(c.surrogate, num_classes=self.num_classes, seed=self.seed, device=self.device)
        place, tensors = progress.load()
        if tensors:
            surrogate.take(tensors)
            self.table.copy_(tensors["table"])
        total = c.epochs * -(-len(pictures) // c.surrogate.batch_size)
        for step in range(place.get("step", 0), total):
            rows = pictures.shuffled(c.surrogate.batch_size, self.seed, step)
            x, y = pictures.read(rows)
            rng = pictures.random(rows, self.seed, step, f"{self.name}/train")
            self.train_step(surrogate, x, y, rng, self.rate(step / total))
            if progress.due():
                self._save(progress, surrogate, step + 1, 0)
        self._craft(surrogate, pictures, progress, total, place.get("crafted", 0))

    def _craft(self, surrogate: Surrogate, pictures: Pictures, progress: Progress, step: int, done: int) -> None:
        log.info("%s: the surrogate is trained, %d pictures are to be moved", self.name, len(pictures))
        with frozen_stats(surrogate), input_gradients_only(surrogate):
            for number, rows in enumerate(pictures.in_turn(self.config.batch_size)):
                if number < done:
                    continue
                x, y = pictures.read(rows)
                self.table[rows] = self.levels(self.craft(surrogate, x, y, self._random(pictures, rows)) - x)
                if progress.due():
                    self._save(progress, surrogate, step, number + 1)
        self._save(progress, surrogate, step, len(pictures))

    def _random(self, pictures: Pictures, rows: Tensor) -> KeyedRandom:
        return pictures.random(rows, self.seed, 0, f"{self.name}/craft")

    def craft(self, surrogate: Surrogate, x: Tensor, y: Tensor, rng: KeyedRandom) -> Tensor:
        """x moved by `steps` sign steps from a random point of the ball, each through a shift and mirror of its own."""
        c = self.config
        # Not recorded as a graph: each step draws other shifts.
        attack = PGD(steps=c.steps, step_size=self.step_size, restarts=c.restarts, graph="off")
        return attack(self._through_shifts(surrogate, y, rng), x, Linf(c.eps), rng)

    def _through_shifts(self, surrogate: Surrogate, y: Tensor, rng: KeyedRandom) -> Objective:
        calls = iter(range(2**62))

        def objective(x: Tensor) -> Tensor:
            seen = shift(x, rng.within(f"step{next(calls)}"), self.config.padding)
            return self.objective(surrogate, seen, y)

        return objective

    def _save(self, progress: Progress, surrogate: Surrogate, step: int, crafted: int) -> None:
        progress.save({"step": step, "crafted": crafted}, {**surrogate.tensors(), "table": self.table})


def shift(x: Tensor, rng: KeyedRandom, padding: int) -> Tensor:
    """Each picture shifted by up to `padding` pixels into black, and half of them mirrored; with gradient."""
    if padding == 0:
        return x
    u, (height, width) = rng.uniform("shift", 3), x.shape[2:]
    down, across = ((u[:, i : i + 1] * (2 * padding + 1)).long() for i in (0, 1))
    rows = down + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(len(x), width)
    columns = torch.where(u[:, 2:3] < 0.5, columns.flip(1), columns) + across
    padded = torch.nn.functional.pad(x, [padding] * 4)
    taken = padded.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, padded.shape[3]))
    return taken.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], height, -1))
