"""UEraser: train on the worst of several strong augmentations of each picture. Source: Qin et al. 2023.

A shortcut that some augmentation destroys costs the classifier loss there, and that is the copy which is trained on.
The augmentation: clouds of brightness, clouds of contrast, channels in another order, then one of twelve operations.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from poisonshield import collectives
from poisonshield.batch import Batch, StepOutput
from poisonshield.config import Settings
from poisonshield.defenses.base import Defense, Wrapped
from poisonshield.defenses.parts.classifier import plain_classifier
from poisonshield.defenses.parts.plasma import draw_plasma
from poisonshield.defenses.parts.trivial import trivial_augment
from poisonshield.method import SSLMethod
from poisonshield.ops import jpeg
from poisonshield.ops.precision import at_least_float32
from poisonshield.random import KeyedRandom

ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


class UEraser(Defense):
    """Cross-entropy of each picture's worst of several strong augmentations."""

    name: ClassVar[str] = "ueraser"

    class Config(Settings):
        """How often, how strong, and how long."""

        variant: Literal["lite", "std", "max"] = Field(
            "max", description="max: the worst of `repeat` copies throughout; std: for the first epochs; lite: one copy"
        )
        repeat: int = Field(5, ge=2, description="copies of a picture, of which the worst counts")
        epochs: int = Field(50, ge=1, description="std: epochs with `repeat` copies; the authors also write 60")
        p: float = Field(1.0, ge=0, le=1, description="chance of each cloud; the authors' own repository has 0.5")
        roughness: tuple[float, float] = Field((0.3, 0.7), description="range of the clouds' roughness")
        intensity: tuple[float, float] = Field(
            (0.5, 1.0), description="range of the clouds' brightness; (0.3, 1) for ImageNet"
        )
        jpeg: int | None = Field(
            None, ge=1, le=100, description="quality of a JPEG of every copy, against tap and ar; null for none"
        )

    def wrap(self, method: SSLMethod) -> SSLMethod:
        """Raises ConfigError for a method that is no plain classifier."""
        return UEraserMethod(plain_classifier(method, self.name), self.config, self.seed)


class UEraserMethod(Wrapped):
    """The mean over samples of max over copies r of CE(f(augment_r(view)), y), all copies in one pass."""

    def __init__(self, method: SSLMethod, config: UEraser.Config, seed: int) -> None:
        super().__init__(method)
        self.config, self.seed = config, seed

    def forward(self, batch: Batch) -> StepOutput:
        """The method's own loss, such as its label smoothing, is not used."""
        y, c, losses = batch.labels(), self.config, []
        several = c.variant == "max" or (c.variant == "std" and batch.epoch < c.epochs)
        repeat = c.repeat if several else 1
        for i, view in enumerate(batch.all_views()):
            rng = batch.random(self.seed, view.device)
            with torch.no_grad():
                copies = [self.augment(view, rng.within(f"ueraser/view{i}/copy{r}")) for r in range(repeat)]
            scores = at_least_float32(self.method.scores(torch.cat(copies)))
            each = F.cross_entropy(scores, y.repeat(repeat), reduction="none")
            losses.append(each.view(repeat, -1).amax(0))
        loss = collectives.mean(torch.stack(losses).mean(0), batch.rank_sizes)
        return StepOutput(loss, {"ce": loss.detach()})

    def augment(self, x: Tensor, rng: KeyedRandom) -> Tensor:
        """x [B, 3, H, W] in [0, 1], augmented once."""
        c = self.config
        u = rng.uniform("ueraser", 7)
        size = (x.shape[1], x.shape[2], x.shape[3])
        cloud = draw_plasma(rng, size, _between(u[:, 0], c.roughness), "brightness")
        weight = _between(u[:, 1], c.intensity).view(-1, 1, 1, 1)
        x = _chosen(u[:, 2] < c.p, (x + weight * (2 * cloud - 1)).clamp(0, 1), x)
        cloud = draw_plasma(rng, size, _between(u[:, 3], c.roughness), "contrast")
        x = _chosen(u[:, 4] < c.p, ((x - 0.5) * 4 * cloud + 0.5).clamp(0, 1), x)
        orders = torch.tensor(ORDERS, device=x.device)[(u[:, 5] * len(ORDERS)).long()]  # [B, 3]
        shuffled = x.gather(1, orders.view(-1, 3, 1, 1).expand_as(x))
        x = trivial_augment(_chosen(u[:, 6] < 0.5, shuffled, x), rng)
        return x if c.jpeg is None else jpeg(x, c.jpeg, mode="exact")


def _between(u: Tensor, ends: tuple[float, float]) -> Tensor:
    return ends[0] + (ends[1] - ends[0]) * u


def _chosen(which: Tensor, changed: Tensor, x: Tensor) -> Tensor:
    return torch.where(which.view(-1, 1, 1, 1), changed, x)
