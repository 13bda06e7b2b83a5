"""Robust error-minimising noise in the cheap form of APBench: em whose noise starts each round at an adversarial one.

Each round every picture's adversarial noise goes on up the loss within half the radius, and the error-minimising noise
starts there. Not the algorithm of the paper (2203.14533), which attacks inside each step and averages over
augmentations, at some fifty times em's cost; hence the name.
"""

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.attacks import Repeated
from poisonshield.config import Pixels
from poisonshield.poisons.learned.pictures import Pictures
from poisonshield.poisons.learned.progress import Progress
from poisonshield.poisons.learned.rounds import RoundsConfig, RoundsPoison, ascend
from poisonshield.poisons.learned.surrogate import Surrogate, SurrogateConfig


class REMLite(RoundsPoison):
    """Noise that makes the loss small, from noise that made it large, learned beside a surrogate."""

    class Config(RoundsConfig):
        """Both kinds of steps."""

        attack_eps: Pixels | None = Field(None, description="radius of the adversarial noise; null is eps / 2")
        attack_steps: int = Field(5, ge=1, description="its steps of a round, each a fifth of its radius")
        steps: int = Field(5, ge=1, description="error-minimising steps of a round, each a fifth of eps")
        stop: float = Field(0.01, ge=0, le=1, description="error at which the rounds end")
        surrogate: SurrogateConfig = Field(
            SurrogateConfig(batch_size=128, clip=5.0), description="the classifier that learns beside the noise"
        )

    name = "rem_lite"
    source = "APBench, after 2203.14533"
    config: Config

    def __init__(self, config: Config, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(config, num_classes=num_classes, image_size=image_size, seed=seed)
        self.adversary = torch.zeros(0, dtype=torch.int8)  # [N, 3, H, W] in levels

    @property
    def stop_error(self) -> float:
        """As set."""
        return self.config.stop

    def learn(self, pictures: Pictures, progress: Progress) -> None:
        """Rounds, with the adversarial noise beside them."""
        self.adversary = torch.zeros_like(self.table)
        super().learn(pictures, progress)
        self.adversary = torch.zeros(0, dtype=torch.int8)

    def improve(self, surrogate: Surrogate, x: Tensor, rows: Tensor, y: Tensor) -> None:
        """The adversarial noise goes on; the error-minimising one starts where it is now."""
        c = self.config
        radius = c.eps / 2 if c.attack_eps is None else c.attack_eps
        reads = (*surrogate.parameters(), *surrogate.buffers())
        before = self.adversary[rows].to(x.device).float() / 255
        upwards = Repeated(surrogate.loss_of_each, (y,), reads)
        bad = ascend(upwards, x, before, eps=radius, steps=c.attack_steps, step_size=radius / 5) - x
        self.adversary[rows] = self.levels(bad)
        good = self.descend(surrogate, x, y, bad, steps=c.steps, step_size=c.eps / 5)
        self.table[rows] = self.levels(good - x)

    def more_state(self) -> dict[str, Tensor]:
        """The adversarial noise."""
        return {"adversary": self.adversary}

    def take_more(self, tensors: dict[str, Tensor]) -> None:
        """The adversarial noise."""
        self.adversary = tensors["adversary"]
