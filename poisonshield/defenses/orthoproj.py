"""Orthogonal projection: pictures lose what a linear classifier reads off them. Source: Sandoval-Segura et al. 2023.

A linear softmax without bias is fitted to the (perhaps poisoned) training pictures; its K weights span the directions
that a linear shortcut can use, and every picture is projected onto what is perpendicular to them. Removes class-wise
noise entirely and one-pixel marks mostly; sample-wise noise, which has no K directions, it leaves.
"""

from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.defenses.base import Context, Defense
from poisonshield.defenses.purify.levels import levels
from poisonshield.errors import DataError, PoisonShieldError, ShapeError
from poisonshield.random import philox_uniform, philox_words, sample_ids, stream_of


class OrthoProj(Defense):
    """Replaces pixels x by x - Q Q'x, Q a basis of a linear classifier's weights. Not clipped to [0, 1]."""

    name: ClassVar[str] = "orthoproj"
    looks_first: ClassVar[bool] = True

    class Config(Settings):
        """How the linear classifier is fitted: plain SGD, its rate a tenth after half and after three quarters."""

        epochs: int = Field(20, ge=1, description="passes over the training pictures")
        batch_size: int = Field(1024, ge=1, description="pictures of a step")
        lr: float = Field(0.1, gt=0, description="learning rate at first")

    def __init__(self, config: Config, context: Context | None = None) -> None:
        super().__init__(config, context)
        self.basis: Tensor | None = None  # [3 H W, K], orthonormal columns

    @property
    def exact(self) -> bool:
        """A fit has a part in it."""
        return False

    def look(self, batches: Iterable[Batch]) -> None:
        """Fit the classifier to all training pictures, held as bytes, and keep the basis of its weights.

        Raises DataError where there are fewer than two classes or fewer pixels than classes, ShapeError where pictures
        differ in size.
        """
        pixels, y, ids = _collect(batches)
        count = self.context.num_classes or int(y.max()) + 1
        if not 2 <= count <= pixels.shape[1]:
            raise DataError(
                f"orthoproj tells classes apart by a linear classifier, and there are {count} classes and "
                f"{pixels.shape[1]} values in a picture.\n  Give data of two classes or more, fewer than values."
            )
        weights = self._fit(pixels, y, ids, count)
        self.basis = torch.linalg.qr(F.normalize(weights, dim=1).T.double())[0].float()

    def _fit(self, pixels: Tensor, y: Tensor, ids: Tensor, count: int) -> Tensor:
        """Weights [K, D]; samples are shuffled by key, so that the order of the data does not matter."""
        c, length = self.config, pixels.shape[1]
        u = philox_uniform((count, length), self.seed, stream=stream_of("orthoproj weights"))
        weights = (2 * u - 1) / length**0.5  # as torch draws a linear layer
        for epoch in range(c.epochs):
            lr = c.lr * 0.1 ** ((2 * epoch >= c.epochs) + (4 * epoch >= 3 * c.epochs))
            lots = philox_words(1, seed=self.seed, ids=ids, offset=epoch, stream=stream_of("orthoproj order"))[:, 0]
            for rows in lots.argsort(stable=True).split(c.batch_size):
                x = pixels[rows].float() / 255
                error = (x @ weights.T).softmax(1) - F.one_hot(y[rows], count)  # d CE / d scores
                weights -= lr / len(rows) * error.T @ x
        return weights

    def before(self, batch: Batch) -> Batch:
        """x projected, float32 [B, 3, H, W], which may leave [0, 1]."""
        if self.basis is None:
            raise PoisonShieldError("orthoproj was given pictures before it saw the training set. Call look(batches).")
        x = batch.pixels()
        basis = self.basis = self.basis.to(x.device)
        flat = x.flatten(1)
        if flat.shape[1] != len(basis):
            raise ShapeError(f"orthoproj saw pictures of {len(basis)} values and got {list(x.shape)}. Resize them.")
        return batch.replace(x=(flat - flat @ basis @ basis.T).view_as(x))


def _collect(batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """All pictures as uint8 [N, D], labels int64 [N] and ids int64 [N], in the order of the ids."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        flat = levels(batch.pixels()).to("cpu", torch.uint8).flatten(1)
        if parts and flat.shape[1] != parts[0][0].shape[1]:
            raise ShapeError("orthoproj needs pictures of one size, and the data has several. Import it with --size.")
        parts.append((flat, batch.labels().cpu(), sample_ids(batch.keys)))
    if not parts:
        raise DataError("orthoproj was shown no training picture to fit its linear classifier to.")
    pixels, y, ids = (torch.cat(column) for column in zip(*parts, strict=True))
    order = ids.argsort()
    return pixels[order], y[order], ids[order]
