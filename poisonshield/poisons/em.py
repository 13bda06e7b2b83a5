"""Error-minimising noise, which its paper calls unlearnable examples: pictures that a network is right about at once.

min over weights and noise together of CE(f(x + delta), y): a surrogate learns for some steps, then every picture's
noise takes sign steps down its loss, in turns until the surrogate makes no errors. What is left to learn from such a
picture is its noise. Source: Huang et al. 2021 (2101.04898).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.config import Pixels
from poisonshield.poisons.learned.pictures import Pictures
from poisonshield.poisons.learned.rounds import RoundsConfig, RoundsPoison
from poisonshield.poisons.learned.surrogate import Surrogate
from poisonshield.random import philox_uniform, stream_of


class EM(RoundsPoison):
    """Noise that makes the loss small, for each picture or for each class, learned beside a surrogate."""

    class Config(RoundsConfig):
        """How far, how often, and for whom."""

        per: Literal["sample", "class"] = Field("sample", description="whether each picture has its noise or a class")
        step_size: Pixels = Field(0.8 / 255, gt=0, description="length of a sign step, in pixel units")
        steps: int | None = Field(None, ge=1, description="sign steps of a round; null is 20 by sample, 1 by class")
        stop: float | None = Field(
            None, ge=0, le=1, description="error at which the rounds end; null is 0.01 by sample, 0.1 by class"
        )
        share: float | None = Field(
            None,
            gt=0,
            le=1,
            description="part of the pictures that noise by class is learned on; null is 0.2. By sample it is all",
        )

    name = "em"
    source = "2101.04898"
    config: Config

    def __init__(self, config: Config, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(config, num_classes=num_classes, image_size=image_size, seed=seed)
        self.grain = config.per  # type: ignore[misc]
        self.noise = torch.zeros(0)  # [K, 3, H, W] of classes in the search, in pixel units, not rounded

    @property
    def stop_error(self) -> float:
        """0.01 by sample, 0.1 by class, or as set."""
        return self.config.stop if self.config.stop is not None else (0.01 if self.grain == "sample" else 0.1)

    def chosen_pictures(self, pictures: Pictures) -> Pictures:
        """All by sample; by class a fifth, or the share that is set."""
        return pictures if self.grain == "sample" else pictures.share(self.config.share or 0.2, self.seed)

    def begin(self) -> None:
        """Zero by sample; uniform in the box by class."""
        if self.grain == "class":
            u = philox_uniform((self.num_classes, *self.table.shape[1:]), self.seed, stream=stream_of("em start"))
            self.noise = (self.config.eps * (2 * u - 1)).to(self.device)

    def of_rows(self, rows: Tensor, y: Tensor) -> Tensor:
        """By class the noise as it is in the search."""
        return super().of_rows(rows, y) if self.grain == "sample" else self.noise[y]

    def improve(self, surrogate: Surrogate, x: Tensor, rows: Tensor, y: Tensor) -> None:
        """T sign steps; by class the mean over its pictures, in the box."""
        steps = self.config.steps or (20 if self.grain == "sample" else 1)
        moved = self.descend(surrogate, x, y, self.of_rows(rows, y), steps=steps, step_size=self.config.step_size) - x
        if self.grain == "sample":
            self.table[rows] = self.levels(moved)
        else:
            self.noise = average_by_class(moved, y, self.noise).clamp(-self.config.eps, self.config.eps)

    def more_state(self) -> dict[str, Tensor]:
        """The noise of classes."""
        return {} if self.grain == "sample" else {"noise": self.noise}

    def take_more(self, tensors: dict[str, Tensor]) -> None:
        """The noise of classes."""
        self.noise = tensors["noise"].to(self.device) if "noise" in tensors else self.noise

    def end(self) -> None:
        """Noise of classes becomes levels."""
        if self.grain == "class":
            self.table.copy_(self.levels(self.noise))


def average_by_class(delta: Tensor, y: Tensor, before: Tensor) -> Tensor:
    """The mean delta of each class's samples, [K, 3, H, W]; `before` for a class that has none here."""
    counts = torch.zeros(len(before), device=y.device).index_add_(0, y, torch.ones_like(y, dtype=torch.float32))
    # As a product of matrices, which has one order of additions where index_add_ has any on a GPU.
    member = torch.nn.functional.one_hot(y, len(before)).T.to(delta.dtype)
    sums = (member @ delta.flatten(1)).view_as(before)
    present = (counts > 0).view(-1, 1, 1, 1)
    return torch.where(present, sums / counts.clamp_min(1).view(-1, 1, 1, 1), before)
