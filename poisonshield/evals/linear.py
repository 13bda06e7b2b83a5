"""Linear probe: how well a linear classifier on frozen training features does on clean test features."""

import torch
import torch.nn.functional as F

from poisonshield.evals.features import Features


def linear(
    train: Features, test: Features, *, num_classes: int, weight_decay: float = 1e-4, iterations: int = 100
) -> float:
    """Top-1 accuracy in percent. Softmax regression on standardised features by L-BFGS, from zero: nothing is random.

    weight_decay multiplies half the squared weights, per mean loss. Costs `iterations` passes over the features.
    """
    mean, std = train.h.mean(0), train.h.std(0).clamp(min=1e-6)
    h = (train.h - mean) / std
    weight = h.new_zeros(num_classes, h.shape[1], requires_grad=True)
    bias = h.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(h @ weight.T + bias, train.y) + 0.5 * weight_decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        scores = ((test.h - mean) / std) @ weight.T + bias
    return 100.0 * (scores.argmax(1) == test.y).double().mean().item()
