"""A loop of projected gradient descent with the package's two operators, which work in place.

    python launch/examples/pgd_loop.py --attack-steps 10 --eps-levels 4

Trains a small network on bundled CIFAR-10 pictures for some seconds, then searches within eps of each test picture for
one that the network gets wrong. Prints accuracy before and after, and the largest change of a pixel.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poisonshield.data import open_dataset
from poisonshield.ops import pgd_random_start_, pgd_step_


def pictures(split: str, count: int) -> tuple[Tensor, Tensor]:
    """x [count, 3, 32, 32] in [0, 1] and labels y [count]."""
    data, rows = open_dataset("cifar10-mini", split), torch.arange(count)
    return data.read(rows).float() / 255, data.labels[rows]


def network() -> nn.Sequential:
    """Pixels [B, 3, 32, 32] -> logits [B, 10]."""
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(576, 10),
    )  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> None:
    """Ordinary training with Adam on batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def attack(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, eps: float) -> Tensor:
    """Pictures within eps of x, each with a larger loss; radii in pixel units (4/255, not 4)."""
    x_adv = pgd_random_start_(x.clone(), x, eps=eps, seed=0)
    for _ in range(steps):
        leaf = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(leaf), y, reduction="sum")  # a sum: no picture's step depends on the others
        (grad,) = torch.autograd.grad(loss, leaf)
        pgd_step_(x_adv, grad, x, step_size=2.5 * eps / steps, eps=eps)
    return x_adv


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent."""
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).double().mean().item()


def main() -> None:
    """Train, attack, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--eps-levels", type=float, default=4, help="radius, in levels of 256")
    parser.add_argument("--pictures", type=int, default=256, help="test pictures to attack")
    options = parser.parse_args()
    torch.manual_seed(0)

    model, eps = network(), options.eps_levels / 255
    train(model, *pictures("train", 2000), steps=options.train_steps)
    model.eval()
    x, y = pictures("test", options.pictures)
    x_adv = attack(model, x, y, steps=options.attack_steps, eps=eps)
    change = 255 * (x_adv - x).abs().max().item()
    print(
        f"accuracy {accuracy(model, x, y):.1f} % on clean pictures, {accuracy(model, x_adv, y):.1f} % on attacked ones"
    )
    print(f"largest change of a pixel: {change:.2f} of 256 levels")


if __name__ == "__main__":
    main()
