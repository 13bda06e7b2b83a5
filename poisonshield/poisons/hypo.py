"""Hypocritical perturbations: every picture is moved towards its own class, as a slightly robust network sees it.

Meant against adversarial training, which takes such pictures for easy; weak against ordinary training by design.
Source: Tao et al. 2021 (2102.04716) and 2022 (2201.13329).
"""

from pydantic import Field
from torch import Tensor

from poisonshield.attacks import PGD, Linf, Repeated, frozen_stats
from poisonshield.config import Pixels
from poisonshield.models.batchnorm import input_gradients_only
from poisonshield.poisons.learned.crafting import CraftConfig, CraftedPoison, shift
from poisonshield.poisons.learned.surrogate import Surrogate
from poisonshield.random import KeyedRandom


class Hypo(CraftedPoison):
    """Makes each picture's loss small for a network that was briefly trained adversarially."""

    class Config(CraftConfig):
        """The surrogate's robustness and the steps."""

        epochs: int = Field(10, ge=0, description="passes of the surrogate over the pictures")
        steps: int = Field(100, ge=1, description="sign steps of each picture")
        step_size: Pixels = Field(0.8 / 255, gt=0, description="length of a sign step, in pixel units")
        train_eps: Pixels = Field(2 / 255, ge=0, description="radius of the surrogate's adversarial training")
        train_steps: int = Field(10, ge=1, description="steps of the attack in it, each a quarter of its radius")

    name = "hypo"
    source = "2102.04716"
    config: Config

    @property
    def step_size(self) -> float:
        """As set."""
        return self.config.step_size

    def train_step(self, surrogate: Surrogate, x: Tensor, y: Tensor, rng: KeyedRandom, rate: float) -> None:
        """One step on pictures that were attacked within train_eps."""
        c, seen = self.config, shift(x, rng, self.config.padding)
        attack = PGD(steps=c.train_steps, step_size=c.train_eps / 4)
        with frozen_stats(surrogate), input_gradients_only(surrogate):
            reads = (*surrogate.parameters(), *surrogate.buffers())
            seen = attack(Repeated(surrogate.loss_of_each, (y,), reads), seen, Linf(c.train_eps), rng)
        surrogate.learn(seen, y, rate=rate)

    def objective(self, surrogate: Surrogate, x: Tensor, y: Tensor) -> Tensor:
        """Minus the loss of the label."""
        return surrogate.gain_of_each(x, y)
