"""LSP, linearly separable perturbations: coloured squares drawn per sample around a vertex per class.

Earlier poisons turn out almost linearly separable, so draw noise that is, directly; no network and no data needed.
Source: Yu et al. 2022, "Availability attacks create shortcuts" (2111.00898), which draws with scikit-learn's
make_classification. The form below has the same distribution, needs nothing, and serves unbalanced classes as they are.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.config import Pixels, Settings
from poisonshield.poisons.base import KeyedPoison, Labelled, Radius
from poisonshield.random import distinct_signs, philox_uniform, stream_of

SEPARATION = 10.0  # distance of a class from the origin, along each of the d directions


class LSP(KeyedPoison):
    """delta = squares of z, z = A_k' n + 10 v_k: vertex v_k and mixing A_k of class k, normal n of the sample.

    The paper's budget is l2 = eps * sqrt(3 H W), which is *not* an l-infinity bound: with eps 6/255 single pixels reach
    16/255. budget="linf" scales the largest pixel to eps instead, which is a weaker poison of our own.
    """

    class Config(Settings):
        """How large the noise is, and how coarse."""

        eps: Pixels = Field(
            default=6 / 255, gt=0, description="root mean square (l2) or largest change (linf) of a value"
        )
        budget: Literal["l2", "linf"] = Field(default="l2", description="the norm that eps bounds")
        patch: int | None = Field(
            default=None,
            ge=1,
            description="side of a square in pixels; None takes 8 for images under 96 px, 32 for the rest",
        )

    name = "lsp"
    source = "2111.00898"
    norm = "l2"
    grain = "sample"
    config: Config
    vertices: Tensor
    mixing: Tensor

    def __init__(self, config: Config, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(config, num_classes=num_classes, image_size=image_size, seed=seed)
        self.patch = config.patch or (8 if min(image_size) < 96 else 32)
        self.cells = tuple(math.ceil(side / self.patch) for side in image_size)
        d = 3 * self.cells[0] * self.cells[1]
        self.register_buffer("vertices", distinct_signs(num_classes, d, seed=seed, purpose="lsp vertices"))  # [K, d]
        # U(-1, 1) in steps of 1/128. With normals in steps of 1/64 every product and partial sum of A'n is exact in
        # float32, so that a sample's pixels do not depend on how a matrix product orders its terms.
        u = philox_uniform((num_classes, d * d), seed, stream=stream_of("lsp mixing"))
        # Not persistent: the seed gives it back to the bit, and 100 classes at 224 px would be 2 MB in a recipe.
        self.register_buffer("mixing", (u.view(-1, d, d) * 255).floor().sub(127).to(torch.int8), persistent=False)

    def budget(self) -> Radius:
        """The l2 radius eps * sqrt(3 H W), or eps of l_inf."""
        norm = self.config.budget
        return Radius(norm, self.config.eps * (math.sqrt(3 * math.prod(self.image_size)) if norm == "l2" else 1.0))

    def draw(self, batch: Labelled) -> Tensor:
        """Squares of z = A' n + 10 v, scaled."""
        (h, w), (gh, gw) = self.image_size, self.cells
        n = self.random(batch).normal("lsp noise", self.vertices.shape[1]).mul_(64).round_().div_(64)
        mixing = self.mixing[batch.y].to(torch.float32) / 128  # [B, d, d]
        z = torch.einsum("bij,bi->bj", mixing, n) + SEPARATION * self.vertices[batch.y]  # [B, d]
        z = z.view(-1, gh, gw, 3).permute(0, 3, 1, 2)
        z = z.repeat_interleave(self.patch, dim=2).repeat_interleave(self.patch, dim=3)[:, :, :h, :w]  # [B, 3, H, W]
        return self.budget().fill(z)
