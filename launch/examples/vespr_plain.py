"""VESPR on one page of plain PyTorch, without the engine: `poisonshield.data` and `pgd_step_` alone. arXiv 2409.08509.

    python launch/examples/vespr_plain.py --steps 200

Every class of the training pictures gets faint stripes of its own, and a classifier then learns stripes in place of
objects. VESPR trains it beside SimCLR, on views that are attacked against the classifier's loss, which erases what it
relies on first. Prints the accuracy of both; half a minute on a CPU.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poisonshield.data import open_dataset
from poisonshield.losses.infonce import infonce
from poisonshield.ops import pgd_step_

EPS = 16 / 255  # of the poison and of the attack, in pixel units


def pictures(split: str, count: int) -> tuple[Tensor, Tensor]:
    """x [count, 3, 32, 32] in [0, 1] and labels y [count]."""
    data, rows = open_dataset("cifar10-mini", split), torch.arange(count)
    return data.read(rows).float() / 255, data.labels[rows]


def poisoned(x: Tensor, y: Tensor) -> Tensor:
    """x [N, 3, 32, 32] with the stripes of its class: each colour of four rows at a time is EPS higher or lower."""
    signs = torch.randn(10, 3, 8, 1, generator=torch.Generator().manual_seed(1)).sign()
    return (x + EPS * F.interpolate(signs, size=(32, 32))[y]).clamp(0, 1)


def augment(x: Tensor) -> Tensor:
    """A view of x [B, 3, 32, 32]: shifted by up to 2 pixels, half of them mirrored."""
    x = torch.roll(x, torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)


class Network(nn.Module):
    """An encoder, the classifier on it, and SimCLR's projector. `forward` gives logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.BatchNorm2d(3)]
        for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
            blocks += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.encoder = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, 10)
        self.projector = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 32, 32] in [0, 1]."""
        return self.head(self.encoder(x))


def attacked(model: Network, x: Tensor, y: Tensor) -> Tensor:
    """x, moved by EPS up the classifier's loss. Batch norm's statistics stay as they are."""
    model.eval()
    leaf, x_adv = x.clone().requires_grad_(), x.clone()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    model.train()
    return pgd_step_(x_adv, grad, x, step_size=EPS, eps=EPS)


def train(x: Tensor, y: Tensor, *, steps: int, vespr: bool) -> Network:
    """The network after `steps` batches of 64: supervised, or with VESPR."""
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        views = [augment(x[rows]), augment(x[rows])]
        if vespr:
            views[0] = attacked(model, views[0], y[rows])
        features = [model.encoder(view) for view in views]
        loss = torch.stack([F.cross_entropy(model.head(h), y[rows]) for h in features]).mean()
        if vespr:
            loss = loss + infonce(tuple(model.projector(h) for h in features))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    """Train twice, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=2000, help="for training; half as many for testing")
    options = parser.parse_args()

    clean, y = pictures("train", options.pictures)
    test_x, test_y = pictures("test", min(options.pictures // 2, 1000))
    x = poisoned(clean, y)
    for name, vespr in (("supervised", False), ("VESPR", True)):
        model = train(x, y, steps=options.steps, vespr=vespr)
        with torch.no_grad():
            right = 100 * (model(test_x).argmax(1) == test_y).double().mean()
            seen = 100 * (model(x).argmax(1) == y).double().mean()
        print(f"{name:10}  {right:5.1f} % of clean test pictures, {seen:5.1f} % of poisoned training pictures")


if __name__ == "__main__":
    main()
