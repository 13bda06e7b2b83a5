"""What contrastive poisoning learns against: SimCLR on views of a batch, with gradients back to its pixels."""

import math

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.losses.infonce import infonce
from poisonshield.models.heads import ProjectorConfig, build_projector
from poisonshield.ops import augment
from poisonshield.ops.augment import NOTHING
from poisonshield.poisons.learned.surrogate import Learner, SurrogateConfig
from poisonshield.random import KeyedRandom


class ContrastConfig(SurrogateConfig):
    """Encoder, projector and loss."""

    batch_size: int = Field(512, ge=2, description="pictures of a training step")
    lr: float = Field(0.5, gt=0, description="learning rate of SGD after the warm-up")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay of SGD")
    head: ProjectorConfig = Field(
        ProjectorConfig(projector="byol", hidden=512, out=128), description="the projector after the encoder"
    )
    temperature: float = Field(0.5, gt=0, description="what cosines are divided by")


class Contrast(Learner):
    """SimCLR. The config is a ContrastConfig."""

    config: ContrastConfig

    def build(self, num_classes: int) -> None:
        """A projector."""
        self.projector = build_projector(self.config.head, self.encoder.feature_dim)

    def loss(self, x: Tensor, rng: KeyedRandom) -> Tensor:
        """The loss of two views of x [B, 3, H, W] in [0, 1], a scalar with gradient in x."""
        views = (draw_view(x, rng.within(f"view{i}")) for i in range(2))
        z = tuple(self.projector(self.encoder(view)) for view in views)
        return infonce(z, temperature=self.config.temperature, same_view="others")


def draw_view(x: Tensor, rng: KeyedRandom) -> Tensor:
    """SimCLR's view: crop of 0.2 to 1 of the area, mirror, jitter (0.4, 0.4, 0.4, hue 0.1; chance 0.8), gray (0.2).

    A crop that does not fit is cut to the picture, where others draw again. No blur: pictures of 32 px are soft.
    """
    u, (height, width) = rng.uniform("view", 16), x.shape[2:]
    area, ratio = (0.2 + 0.8 * u[:, 0]) * height * width, torch.exp(math.log(4 / 3) * (2 * u[:, 1] - 1))
    tall = (area / ratio).sqrt().round().clamp(1, height)
    wide = (area * ratio).sqrt().round().clamp(1, width)
    boxes = torch.stack(
        [(u[:, 2] * (height - tall + 1)).floor(), (u[:, 3] * (width - wide + 1)).floor(), tall, wide], 1
    )
    amounts = 2 * u[:, 4:8] - 1
    factors = torch.cat([1 + 0.4 * amounts[:, :3], 0.1 * amounts[:, 3:]], 1)
    order = torch.where(u[:, 12:13] < 0.8, u[:, 8:12].argsort(1), NOTHING)
    return augment(x, boxes, size=height, flip=u[:, 13] < 0.5, factors=factors, order=order, gray=u[:, 14] < 0.2)
