"""OPS, one-pixel shortcut: images of a class get one pixel of one extreme colour, where it differs most from theirs.

Bounded in l0 only, so adversarial training in an l_inf or l2 ball does not help against it; cutting pixels out does.
Source: Wu et al. 2022, "One-pixel shortcut" (2205.12141). Its search compares every image with every candidate; here
two moments per (class, cell, channel) give the same scores, since |v - x| is x or 1 - x. They are sums of whole levels,
exact in float64, so the choice depends neither on the order nor on the batches in which the data came.
"""

from collections.abc import Iterable
from itertools import product

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.errors import ConfigError, PoisonShieldError
from poisonshield.poisons.base import KeyedPoison, Labelled, Radius

CORNERS = torch.tensor(list(product((0, 1), repeat=3)))  # [8, 3], colours of the RGB cube
LARGEST_SCORE = 1e6  # of a cell that has one colour in the whole class; a score has no unit


class OnePixel(KeyedPoison):
    """x' = x with `num_pixels` cells set to a corner of the RGB cube; cells and corners are the class's.

    score(cell, corner) = mean / std of |corner - x| over the images of the class, the channels and the cell's pixels.
    The best pair wins; a (cell, corner) that an earlier class took is out.
    """

    class Config(Settings):
        """How large a cell is, and how many are set."""

        # From 96 px a single pixel does not survive a resized crop, so the default there is our variant.
        patch: int | None = Field(
            default=None,
            ge=1,
            description="side of a cell in pixels; None takes 1 for images under 96 px, 7 for the rest",
        )
        num_pixels: int = Field(default=1, ge=1, description="how many cells are set, the paper's sparsity")

    name = "one_pixel"
    source = "2205.12141"
    norm = "l0"
    grain = "class"
    needs_data = True
    draws = False
    config: Config
    cells: Tensor
    corners: Tensor

    def __init__(self, config: Config, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(config, num_classes=num_classes, image_size=image_size, seed=seed)
        self.patch = config.patch or (1 if min(image_size) < 96 else 7)
        self.grid = tuple(side // self.patch for side in image_size)  # a rest at the right and lower edge stays clean
        cells = self.grid[0] * self.grid[1]
        if config.num_pixels > cells or num_classes * config.num_pixels > 8 * cells:
            raise ConfigError(
                f"one_pixel: {num_classes} classes with {config.num_pixels} cells each need as many different (cell, "
                f"colour) pairs; {cells} cells give {8 * cells}.\n  Use a smaller patch or fewer num_pixels."
            )
        self.register_buffer("cells", torch.full((num_classes, config.num_pixels), -1))
        self.register_buffer("corners", torch.zeros(num_classes, config.num_pixels, 3, dtype=torch.int64))

    def budget(self) -> Radius:
        """How many pixels change: cells times their area."""
        return Radius("l0", float(self.config.num_pixels * self.patch**2))

    def fit(self, batches: Iterable[Batch]) -> None:
        """Choose cells and corners in one pass; memory is two numbers per class, cell and channel."""
        cells = self.grid[0] * self.grid[1]
        counts = torch.zeros(self.num_classes, dtype=torch.int64)
        sums, squares = torch.zeros(2, self.num_classes, 3 * cells, dtype=torch.float64)
        for batch in map(self.checked, batches):
            levels = (batch.x * 255).round().to("cpu", torch.float64)  # whole numbers, exact up to 2^53
            member = torch.nn.functional.one_hot(batch.y.to("cpu"), self.num_classes).T.double()  # [K, B]
            counts += member.sum(1).long()
            sums += member @ self._pool(levels)
            squares += member @ self._pool(levels.square())
        sums, squares = (t.long().view(self.num_classes, 3, cells) for t in (sums, squares))
        taken = torch.zeros(cells, 8, dtype=torch.bool)
        for k in range(self.num_classes):
            scores = self._scores(int(counts[k]) * self.patch**2, sums[k], squares[k])
            scores[taken] = -1.0  # below every score, so that two classes never share a mark
            for i in range(self.config.num_pixels):
                cell, corner = divmod(int(scores.argmax()), 8)
                self.cells[k, i], self.corners[k, i] = cell, CORNERS[corner]
                taken[cell, corner] = True
                scores[cell] = -1.0  # the next one goes elsewhere

    def draw(self, batch: Labelled) -> Tensor:
        """Corner colour minus x in the class's cells, 0 elsewhere."""
        if (self.cells < 0).any():
            raise PoisonShieldError("one_pixel chooses its pixels from the data: call fit(batches) before apply.")
        columns, h, w = self.grid[1], *self.image_size
        cell, colour = self.cells[batch.y], self.corners[batch.y].to(batch.x.dtype)  # [B, n], [B, n, 3]
        rows = torch.arange(h, device=batch.x.device) // self.patch
        where = rows[:, None] * columns + torch.arange(w, device=batch.x.device) // self.patch  # [H, W]
        inside = (rows[:, None] < self.grid[0]) & (torch.arange(w, device=batch.x.device) // self.patch < columns)
        where = where.where(inside, torch.full_like(where, -1))
        delta = torch.zeros_like(batch.x)
        for i in range(cell.shape[1]):
            chosen = (where == cell[:, i, None, None])[:, None]  # [B, 1, H, W]
            delta = torch.where(chosen, colour[:, i, :, None, None] - batch.x, delta)
        return delta

    def _pool(self, levels: Tensor) -> Tensor:
        """Sums over the pixels of each cell: [B, 3, H, W] -> [B, 3 * cells]."""
        gh, gw = self.grid
        levels = levels[:, :, : gh * self.patch, : gw * self.patch]
        if self.patch > 1:
            levels = levels.reshape(-1, 3, gh, self.patch, gw, self.patch).sum((3, 5))
        return levels.flatten(1)

    def _scores(self, count: int, sums: Tensor, squares: Tensor) -> Tensor:
        """float64 [cells, 8] of one class from its sums over `count` values a channel, int64 [3, cells]."""
        if count == 0:
            return torch.zeros(sums.shape[1], 8, dtype=torch.float64)
        # |corner - x| is x where the corner is 0 and 255 - x where it is 1, so two moments serve all eight corners.
        flipped = 255 * count - sums, 255**2 * count - 2 * 255 * sums + squares  # of 255 - x
        first, second = (torch.stack(pair) for pair in zip((sums, squares), flipped, strict=True))  # [2, 3, cells]
        channel = torch.arange(3)
        total, total_squares = first[CORNERS, channel].sum(1), second[CORNERS, channel].sum(1)  # [8, cells]
        n = 3 * count
        variance = (n * total_squares - total.square()).double() / n**2  # whole numbers up to here: no cancellation
        mean = total.double() / n
        return (mean / variance.sqrt()).nan_to_num(nan=0.0, posinf=LARGEST_SCORE).T.contiguous()
