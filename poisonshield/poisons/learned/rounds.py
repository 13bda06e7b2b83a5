"""Rounds of two turns, which error-minimising poisons share: some steps of the surrogate, then all of the noise."""

import logging
from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.attacks import PGD, Linf, Repeated, frozen_stats
from poisonshield.models.batchnorm import input_gradients_only
from poisonshield.poisons.learned.base import LearnedConfig, LearnedPoison
from poisonshield.poisons.learned.pictures import Pictures
from poisonshield.poisons.learned.progress import Progress
from poisonshield.poisons.learned.surrogate import Surrogate, SurrogateConfig

log = logging.getLogger(__name__)


class RoundsConfig(LearnedConfig):
    """The rounds."""

    train_steps: int = Field(10, ge=1, description="steps of the surrogate in a round")
    max_rounds: int = Field(50, ge=1, description="rounds at most: the surrogate may never reach stop_error")
    surrogate: SurrogateConfig = Field(
        SurrogateConfig(batch_size=512, clip=5.0), description="the classifier that learns beside the noise"
    )


class RoundsPoison(LearnedPoison):
    """Trains surrogate and noise in turns until the surrogate is right about the poisoned pictures."""

    config: RoundsConfig

    @property
    @abstractmethod
    def stop_error(self) -> float:
        """The surrogate's share of errors on poisoned pictures under which the rounds end."""

    def chosen_pictures(self, pictures: Pictures) -> Pictures:
        """Those that the search looks at: all, unless a subclass takes fewer."""
        return pictures

    def begin(self) -> None:
        """Noise before the first round: none."""

    def more_state(self) -> dict[str, Tensor]:
        """Tensors that a round needs beside the surrogate and the table."""
        return {}

    def take_more(self, tensors: dict[str, Tensor]) -> None:
        """What `more_state` gave."""

    def poisoned(self, x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
        """x with the noise of now, clipped to [0, 1]."""
        return (x + self.of_rows(rows, y)).clamp(0, 1)

    @abstractmethod
    def improve(self, surrogate: Surrogate, x: Tensor, rows: Tensor, y: Tensor) -> None:
        """Move the noise of one batch; the surrogate stands still and leaves no trace."""

    def learn(self, pictures: Pictures, progress: Progress) -> None:
        """Rounds until the error is small or they are used up."""
        c, seen = self.config, self.chosen_pictures(pictures)
        surrogate = Surrogate(c.surrogate, num_classes=self.num_classes, seed=self.seed, device=self.device)
        place, tensors = progress.load()
        if tensors:
            surrogate.take(tensors)
            self.table.copy_(tensors["table"])
            self.take_more(tensors)
        else:
            self.begin()
        for number in range(place.get("round", 0), c.max_rounds):
            if place.get("done", 0):
                break
            self._train(surrogate, seen, number * c.train_steps)
            with frozen_stats(surrogate), input_gradients_only(surrogate):
                for rows in seen.in_turn(c.surrogate.batch_size):
                    self.improve(surrogate, seen.read(rows)[0], rows, seen.y[rows].to(self.device))
            error = self._measure_error(surrogate, seen)
            log.info("%s: round %d of at most %d, surrogate's error %.4f", self.name, number + 1, c.max_rounds, error)
            done = error < self.stop_error
            state = {**surrogate.tensors(), "table": self.table, **self.more_state()}
            progress.save({"round": number + 1, "done": int(done)}, state)
            if done:
                break
        self.end()

    def end(self) -> None:
        """After the last round."""

    def _train(self, surrogate: Surrogate, seen: Pictures, first: int) -> None:
        for step in range(first, first + self.config.train_steps):
            rows = seen.shuffled(self.config.surrogate.batch_size, self.seed, step)
            x, y = seen.read(rows)
            surrogate.learn(self.poisoned(x, rows, y), y)

    @torch.no_grad()
    def _measure_error(self, surrogate: Surrogate, seen: Pictures) -> float:
        errors = 0
        for rows in seen.in_turn(self.config.surrogate.batch_size):
            x, y = seen.read(rows)
            errors += surrogate.count_errors(self.poisoned(x, rows, y), y)
        return errors / len(seen)

    def descend(
        self, surrogate: Surrogate, x: Tensor, y: Tensor, start: Tensor, *, steps: int, step_size: float
    ) -> Tensor:
        """x with noise that makes the surrogate's error smaller, from x + start: sign steps, ball and [0, 1] each."""
        reads = (*surrogate.parameters(), *surrogate.buffers())
        objective = Repeated(surrogate.gain_of_each, (y,), reads)
        return ascend(objective, x, start, eps=self.config.eps, steps=steps, step_size=step_size)


def ascend(objective: Repeated, x: Tensor, start: Tensor, *, eps: float, steps: int, step_size: float) -> Tensor:
    """x after sign steps up the objective from x + start, in the ball of eps around x and in [0, 1]."""
    attack = PGD(steps=steps, step_size=step_size, random_start=False)
    budget = Linf(eps)
    begin = budget.project_((x + start).clamp(0, 1), x)
    return attack.ascend(objective, x, budget, None, start=begin, success=None)  # type: ignore[arg-type]
