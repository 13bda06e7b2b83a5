"""Heads on top of an encoder: the projectors and predictors of self-supervised methods.

Shapes follow the VESPR authors' table; linear layers have no bias where batch norm follows. E is the encoder's width,
H `hidden`, O `out`, P `predictor`:
    moco        E-H BN ReLU, H-H BN ReLU, H-O BN (no affine)
    simsiam     E-E BN ReLU, E-E BN ReLU, E-O BN (no affine)
    byol        E-H BN ReLU, H-O
    vicreg      E-H BN ReLU, H-H BN ReLU, H-O
    dino_cnn    E-H BN GELU, H-H BN GELU, H-bottleneck, l2-normalized, prototypes O of length 1
    dino_vit    the same without batch norm
    predictor   O-P BN ReLU, P-O with bias
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from poisonshield.config import Settings

ProjectorName = Annotated[
    Literal["moco", "simsiam", "byol", "vicreg", "dino_cnn", "dino_vit"],
    Field(description="The layers of the projector: a row of the table in models/heads.py."),
]


class ProjectorConfig(Settings):
    """The projector and its widths."""

    projector: ProjectorName = "moco"
    hidden: int = Field(2048, gt=0, description="Width of the projector's inner layers; simsiam has the encoder's.")
    out: int = Field(2048, gt=0, description="Width of the projections; of dino, the number of prototypes.")
    bottleneck: int = Field(256, gt=0, description="Width before the prototypes; only dino's projectors have one.")


def build_projector(config: ProjectorConfig, feature_dim: int) -> nn.Sequential:
    """[B, feature_dim] -> [B, out]."""
    name, hidden, out = config.projector, config.hidden, config.out
    if name == "simsiam":
        return nn.Sequential(*_dense_block(feature_dim, feature_dim), *_dense_block(feature_dim, feature_dim),
                             nn.Linear(feature_dim, out, bias=False), nn.BatchNorm1d(out, affine=False))  # fmt: skip
    if name == "byol":
        return nn.Sequential(*_dense_block(feature_dim, hidden), nn.Linear(hidden, out, bias=False))
    if name in ("dino_cnn", "dino_vit"):
        norm = (lambda: [nn.BatchNorm1d(hidden)]) if name == "dino_cnn" else list
        layers = [nn.Linear(feature_dim, hidden), *norm(), nn.GELU(), nn.Linear(hidden, hidden), *norm(), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(hidden, config.bottleneck), Prototypes(config.bottleneck, out))
    last = [nn.Linear(hidden, out, bias=False)] + ([nn.BatchNorm1d(out, affine=False)] if name == "moco" else [])
    return nn.Sequential(*_dense_block(feature_dim, hidden), *_dense_block(hidden, hidden), *last)


def _dense_block(inputs: int, outputs: int) -> list[nn.Module]:
    """Linear, batch norm, ReLU."""
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]


class Prototypes(nn.Module):
    """Cosines of [B, inputs] with `outputs` directions: weight norm whose magnitudes are fixed at 1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        # Drawn as a linear layer draws; only the directions count.
        self.weight = nn.Linear(inputs, outputs, bias=False).weight

    def forward(self, x: Tensor) -> Tensor:
        """[B, outputs] in [-1, 1]."""
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class Predictor(nn.Module):
    """Two layers on a projection, view by view."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_dense_block(width, hidden), nn.Linear(hidden, width))

    def forward(self, views: tuple[Tensor, ...], rank_sizes: tuple[int, ...] | None) -> tuple[Tensor, ...]:
        """One [B, width] for each view."""
        return tuple(self.layers(z) for z in views)
