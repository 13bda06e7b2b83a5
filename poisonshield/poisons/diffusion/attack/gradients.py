"""Gradients for pixels through a frozen latent diffusion model, one network's graph at a time.

    z = encode(x)            without a graph
    g = d loss / d z         the U-Net's graph, then freed
    d <g, encode(x)> / d x   the VAE's graph
With the same posterior noise in both passes this is the exact gradient; its peak is the larger of the two graphs, not
their sum, for one more encoder forward. Poisons that drop the U-Net's Jacobian give their own g and need no U-Net
graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from poisonshield.models.diffusion.pipeline import LatentDiffusion

Change = Callable[[Tensor], Tensor]
"""Pixels to pixels, the same in every call."""


def gradient_of(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """d sum(loss) / d at of `loss(at) -> [B]`, for at [B, ...] (pixels or latents) cut off from what made it."""
    leaf = at.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(loss(leaf).sum(), leaf)[0]


def pixel_gradient(
    model: LatentDiffusion,
    x: Tensor,
    cotangent: Change,
    *,
    posterior: Tensor | None,
    change: Change,
    recompute: bool = True,
) -> Tensor:
    """d <g, z> / d x [B, 3, h, w], with z = encode(change(x)) and g = cotangent(z) held constant.

    posterior: noise of the VAE's sample, None for its mean. recompute: encode twice, instead of holding the encoder's
    graph while the cotangent is computed; the result is the same to the bit.
    """
    leaf = x.detach().requires_grad_()
    if recompute:
        with torch.no_grad():
            g = cotangent(model.encode(change(leaf), noise=posterior))
    with torch.enable_grad():
        z = model.encode(change(leaf), noise=posterior)
        if not recompute:
            g = cotangent(z.detach())
        return torch.autograd.grad(z, leaf, g.to(z.dtype))[0]


def squared_error(pred: Tensor, target: Tensor, mask: Tensor | None = None, area: Tensor | None = None) -> Tensor:
    """The mean squared error of each row, [B]. mask [B, 1, h, w]: weights; area [B]: what their sum is divided by.

    Differentiable in both, unlike the fused loss, since a velocity depends on the latents that are attacked.
    """
    e = (pred - target).square()
    if mask is None or area is None:
        return e.flatten(1).mean(1)
    return (e * mask).flatten(1).sum(1) / (e.shape[1] * area)
