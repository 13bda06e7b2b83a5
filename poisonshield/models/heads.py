"""Heads on top of an encoder: projectors of self-supervised methods."""

from torch import nn


def projector(feature_dim: int, *, hidden: int, out: int) -> nn.Sequential:
    """Three linear layers with batch norm, the last one without affine: MoCo v3's head, VESPR's default.

    [B, feature_dim] -> [B, out]. No biases, since batch norm follows each layer.
    """
    return nn.Sequential(
        nn.Linear(feature_dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=False),
    )
