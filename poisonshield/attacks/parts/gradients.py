"""The one gradient that attacks ask for.

That of the *summed* loss, so a sample's step does not depend on its batch and small gradients do not vanish in half
precision; and of the pixels alone, so no weight gradient is made.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from poisonshield.errors import GradientError, ShapeError
from poisonshield.ops.check import kind


def loss_and_gradient(
    objective: Callable[..., Tensor], x_adv: Tensor, *rows: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Each sample's loss [B] and its gradient in the pixels [B, ...], detached; the gradient is `scale` times as long.

    rows: passed on to the objective, where it is asked about a part of its batch. Costs a forward and an
    input-gradient backward. Raises ShapeError for an objective that gives something else than a loss of each sample,
    GradientError for one that does not depend on the pixels.
    """
    leaf = x_adv.detach().requires_grad_()  # shares memory; its graph is gone before anybody moves it
    with torch.enable_grad():
        loss = objective(leaf, *rows)
        if not isinstance(loss, Tensor) or loss.shape != x_adv.shape[:1]:
            raise ShapeError(
                f"the objective gave {kind(loss)} for {len(x_adv)} samples. "
                f'Give a loss of each, [{len(x_adv)}], as reduction="none" does.'
            )
        if not loss.requires_grad:
            raise GradientError("the objective does not depend on the pixels. Leave out .detach() and torch.no_grad().")
        (grad,) = torch.autograd.grad(loss.sum() * scale, leaf)
    return loss.detach(), grad


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], so that it broadcasts over the pixels of x."""
    return values.view(-1, *[1] * (x.dim() - 1))
