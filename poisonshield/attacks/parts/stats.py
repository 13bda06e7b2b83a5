"""Guards that keep a model still while an attack reads its gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen_stats(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside (batch statistics and dropout stand still); each submodule's own mode comes back after."""
    training = [m for module in modules for m in module.modules() if m.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def batch_stats(*modules: nn.Module) -> Iterator[None]:
    """Training mode inside (batch norm reads the attacked batch's statistics); buffers and modes come back after.

    Whatever a forward moves in training mode (running statistics, centres, queues) is as before; costs one copy of
    the buffers.
    """
    resting = [m for module in modules for m in module.modules() if not m.training]
    buffers = [b for module in modules for b in module.buffers()]
    before = [b.clone() for b in buffers]
    for module in modules:
        module.train()
    try:
        yield
    finally:
        for m in resting:
            m.training = False
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
