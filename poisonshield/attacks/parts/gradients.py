"""The one gradient that attacks ask for.

That of the *summed* loss, so a sample's step does not depend on its batch and small gradients do not vanish in half
precision; and of the pixels alone, so no weight gradient is made.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def loss_and_gradient(
    objective: Callable[..., Tensor], x_adv: Tensor, *rows: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Each sample's loss [B] and its gradient in the pixels [B, ...], detached; the gradient is `scale` times as long.

    rows: passed on to the objective, where it is asked about a part of its batch. Costs a forward and an
    input-gradient backward.
    """
    leaf = x_adv.detach().requires_grad_()  # shares memory; its graph is gone before anybody moves it
    with torch.enable_grad():
        loss = objective(leaf, *rows)
        (grad,) = torch.autograd.grad(loss.sum() * scale, leaf)
    return loss.detach(), grad


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], so that it broadcasts over the pixels of x."""
    return values.view(-1, *[1] * (x.dim() - 1))
