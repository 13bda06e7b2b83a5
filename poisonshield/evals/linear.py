"""Linear probe: how well a linear classifier on frozen training features does on clean test features.

`linear` is one exact, deterministic optimum; `linear_sweep` is SGD at many learning rates at once, as papers probe.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from poisonshield.config import Settings
from poisonshield.evals.base import Evaluation, Number, Subject
from poisonshield.evals.parts.features import Features, check_features
from poisonshield.ops.check import check_number


class Linear(Evaluation[Subject]):
    """A linear classifier on frozen features."""

    name = "linear"
    place = 30
    numbers = (Number("linear_top1", "linear probe", "%", "higher", digits=1, column="always"),)

    class Config(Settings):
        """The exact probe, and SGD probes beside it."""

        weight_decay: float = Field(1e-4, ge=0, description="Of the exact probe, on half its squared weights.")
        rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
            (), description="Learning rates of SGD probes, one probe each; none by default."
        )
        epochs: int = Field(100, ge=1, description="Epochs of the SGD probes.")

    def lacks(self, subject: Subject) -> str | None:
        """Two classes or more, and test images."""
        return subject.without_classes() or subject.without_test()

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """And, under "sweep", {learning rate: top-1} of the SGD probes, if the settings ask for some."""
        train, test, k = subject.train_features, subject.test_features, subject.num_classes
        values: dict[str, Any] = {
            "linear_top1": linear(train, test, num_classes=k, weight_decay=self.config.weight_decay)
        }
        if self.config.rates:
            values["sweep"] = linear_sweep(
                train,
                test,
                num_classes=k,
                learning_rates=self.config.rates,
                epochs=self.config.epochs,
                seed=subject.seed,
            )
        return values


def linear(
    train: Features, test: Features, *, num_classes: int, weight_decay: float = 1e-4, iterations: int = 100
) -> float:
    """Top-1 accuracy in percent. Softmax regression on standardised features by L-BFGS, from zero: nothing is random.

    weight_decay multiplies half the squared weights, per mean loss. Costs `iterations` passes over the features.
    """
    check_number("weight_decay", weight_decay, least=0)
    check_number("iterations", iterations, least=1, whole=True)
    check_features(train, test, num_classes)
    h, test_h = _standardize(train.h, test.h)
    weight = h.new_zeros(num_classes, h.shape[1], requires_grad=True)
    bias = h.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(h @ weight.T + bias, train.y) + 0.5 * weight_decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        scores = test_h @ weight.T + bias
    return 100.0 * (scores.argmax(1) == test.y).double().mean().item()


@torch.no_grad()
def linear_sweep(
    train: Features,
    test: Features,
    *,
    num_classes: int,
    learning_rates: Sequence[float],
    weight_decay: float = 0.0,
    epochs: int = 100,
    batch_size: int = 512,
    seed: int = 0,
) -> dict[float, float | None]:
    """Top-1 accuracy in percent of one probe for each learning rate, {rate: accuracy}; None where it diverged.

    L probes are trained together by SGD with momentum 0.9 from zero, in the same order of samples, on standardised
    features: a step is two products of [B, D] and [L, D, K], so L rates cost about one pass where L is small.
    weight_decay pulls weights and biases. The schedule is `probe_rate`'s. Choosing a rate by these numbers is choosing
    on the test set: report all, or give held-out features as `test`.
    """
    for rate in learning_rates:
        check_number("a learning rate", rate, above=0)
    check_number("weight_decay", weight_decay, least=0)
    check_number("epochs", epochs, least=1, whole=True)
    check_number("batch_size", batch_size, least=1, whole=True)
    check_features(train, test, num_classes)
    h, test_h = (torch.cat([x, x.new_ones(len(x), 1)], 1) for x in _standardize(train.h, test.h))  # bias as a feature
    rates = h.new_tensor(list(learning_rates)).view(-1, 1, 1)  # [L, 1, 1]
    target = F.one_hot(train.y, num_classes).to(h.dtype)  # [N, K]
    weight = h.new_zeros(len(rates), h.shape[1], num_classes)  # [L, D + 1, K]
    momentum = torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(h), generator=generator).to(h.device).split(batch_size):
            x = h[rows]
            slope = (torch.matmul(x, weight).softmax(2) - target[rows]) / len(rows)  # d loss / d scores [L, B, K]
            momentum.mul_(0.9).add_(torch.matmul(x.T, slope)).add_(weight, alpha=weight_decay)
            weight -= rates * probe_rate(epoch, epochs) * momentum
    right = (torch.matmul(test_h, weight).argmax(2) == test.y).double().mean(1)  # [L]
    finite = weight.flatten(1).isfinite().all(1)
    return {
        rate: 100.0 * share if whole else None
        for rate, share, whole in zip(learning_rates, right.tolist(), finite.tolist(), strict=True)
    }


def probe_rate(epoch: int, epochs: int) -> float:
    """Share of the peak learning rate in an epoch, counted from 1: a linear warm-up over the first tenth of training,
    then a fifth from each of 60, 75 and 90 % on. The VESPR authors' probe: 1.0 at epoch 1 of 100 for a peak of 10."""
    drops = sum(100 * epoch >= share * epochs for share in (60, 75, 90))
    return min(1.0, epoch / (0.1 * epochs)) * 0.2**drops


def _standardize(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both [N, D] with the training set's mean 0 and standard deviation 1 in each column."""
    spread = train.std(0) if len(train) > 1 else torch.ones_like(train[0])  # one sample has no deviation
    mean, std = train.mean(0), spread.clamp(min=1e-6)
    return (train - mean) / std, (test - mean) / std
