"""Fixed position embedding of a vision transformer: sines and cosines of a patch's column and row. Chen et al. 2021.

With a frozen patch projection (MoCo v3's remedy for unstable training) a learned embedding that is frozen along with it
would be noise forever, which is what the VESPR authors' default does; sines and cosines need no training.
"""

from typing import Any

import torch
from torch import Tensor, nn

from poisonshield.errors import ConfigError


def sincos(rows: int, columns: int, dim: int, *, temperature: float = 10000.0) -> Tensor:
    """[rows * columns, dim], patches row by row: sin(c w), cos(c w), sin(r w), cos(r w), dim / 4 of each.

    c and r are a patch's column and row counted from 0; w falls from 1 towards 1 / temperature. Raises ConfigError if
    four does not divide dim.
    """
    if dim % 4:
        raise ConfigError(f"model.position: sincos needs a width that 4 divides; this network has {dim}. Use learned.")
    rates = temperature ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    c, r = c.flatten()[:, None] * rates, r.flatten()[:, None] * rates  # [rows * columns, dim / 4]
    return torch.cat([c.sin(), c.cos(), r.sin(), r.cos()], dim=1).float()


@torch.no_grad()
def fix_position(vit: Any, name: str) -> None:
    """Writes sines and cosines over a timm ViT's `pos_embed` and freezes it; zero for class and register tokens.

    name: what the error calls the network. Raises ConfigError for one without such a parameter.
    """
    embedding = getattr(vit, "pos_embed", None)
    if not isinstance(embedding, nn.Parameter) or embedding.dim() != 3:
        raise ConfigError(f"model.position: {name} has no position embedding of its own to replace. Leave it out.")
    rows, columns = vit.patch_embed.grid_size
    embedding.zero_()
    # Class and register tokens come first, then the patches.
    embedding[0, embedding.shape[1] - rows * columns :] = sincos(rows, columns, embedding.shape[2])
    embedding.requires_grad_(False)
