"""One PGD step beside the formulas of other libraries, written eagerly as they write them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from poisonshield.bench.harness import Case, Provider, Target, WrongResult
from poisonshield.ops import pgd_step_
from poisonshield.ops.dispatch import Room

_ROOM = Room("pgd")
_STEP, _EPS, _LENGTH, _BALL = 2 / 255, 8 / 255, 0.1, 0.5

_TARGETS = {
    "linf": [
        Target("cuda", "% copy", 90),
        Target("cuda", "textbook, torch.compile", 0.95),
        Target("cuda", "textbook, eager", 3.5),
    ],
    "l2": [Target("cuda", "% copy", 50), Target("cuda", "textbook, torch.compile", 1.5)],
}
"""On a GPU."""


def linf(x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
    """The textbook step."""
    delta = (x + _STEP * grad.sign() - x0).clamp(-_EPS, _EPS)
    return (x0 + delta).clamp(0, 1)


def l2(x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
    """The textbook step."""
    length = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    delta = x + _LENGTH * grad / length - x0
    far = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x0 + delta * (_BALL / far).clamp(max=1)).clamp(0, 1)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """linf and l2."""
    shape = (2, 3, 16, 16) if quick else (1024 if device.type == "cuda" else 64, 3, 224, 224)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(shape, generator=generator).to(device)
    grad = torch.randn(shape, generator=generator).to(device)
    return [_case("linf", linf, x0, grad), _case("l2", l2, x0, grad)]


def _case(norm: str, textbook: Callable[[Tensor, Tensor, Tensor], Tensor], x0: Tensor, grad: Tensor) -> Case:
    step, eps = (_STEP, _EPS) if norm == "linf" else (_LENGTH, _BALL)
    case = Case(f"pgd {norm} step", tuple(x0.shape), 4 * x0.nbytes, "textbook, eager")
    case.targets = _TARGETS[norm] if x0.is_cuda else []
    expected = textbook(x0, grad, x0)

    def checked(name: str, out: Tensor) -> str:
        worst = float((out - expected).abs().max())
        if worst > 1e-5:
            raise WrongResult(f"{name}: the step is off by {worst}")
        return ""

    for name in ("reference", "compiled", "cpu", "triton", "cuda"):
        x = x0.clone()
        missing = _ROOM.missing(name, x.device)

        def run(name: str = name, x: Tensor = x) -> Tensor:
            return pgd_step_(x, grad, x0, step_size=step, eps=eps, norm=norm, backend=name)

        def check(name: str = name) -> str:
            return checked(name, pgd_step_(x0.clone(), grad, x0, step_size=step, eps=eps, norm=norm, backend=name))

        case.providers.append(Provider(name, None if missing else run, check, missing or ""))
    for name, function in (("textbook, eager", textbook), ("textbook, torch.compile", torch.compile(textbook))):
        theirs = partial(function, x0, grad, x0)
        case.providers.append(Provider(name, theirs, partial(lambda n, step: checked(n, step()), name, theirs)))
    case.providers.append(_torchattacks(norm, x0, step, eps))
    return case


def _torchattacks(norm: str, x0: Tensor, step: float, eps: float) -> Provider:
    """torchattacks' own class for one step, with a model that costs little: its gradient is part of the time."""
    try:
        import torchattacks
    except ImportError:
        return Provider("torchattacks", None, missing="torchattacks is not installed")
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).to(x0.device).eval()
    cls = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    attack = cls(model, eps=eps, alpha=step, steps=1, random_start=False)
    labels = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
    return Provider("torchattacks", lambda: attack(x0, labels), lambda: "whole attack of one step, pooling as model")
