"""The pretend CUDA device counts what a real one would be asked for, and computes what a CPU computes."""

import pytest
import torch
from pretend_device import CUDA, PretendTensor, pretend_device
from torch import nn

from poisonshield.ops import pgd_step_


def test_tensors_say_where_they_are():
    with pretend_device():
        x = torch.ones(2, device=CUDA)
        assert (x.device, x.is_cuda, (x + x).device) == (CUDA, True, CUDA)
        assert type(x.cpu()) is torch.Tensor and torch.equal(x.cpu(), torch.ones(2))


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda x: x + 1, 0),
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.sum() > 0), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: (x > 0).nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: torch.tensor([1.0], device=x.device), 1),
        (lambda x: torch.ones(3).to(x.device, non_blocking=True), 1),
        (lambda x: torch.ones(3).pin_memory().to(x.device), 1),
        (lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True), 0),
        (lambda x: torch.full((2,), 3.0, device=x.device), 0),
    ],
)
def test_what_reads_the_device_is_a_wait(call, waits):
    with pretend_device() as seen:
        x = torch.zeros(4, device=CUDA)
        seen.clear()
        call(x)
        assert seen.count("wait") == waits, seen.table()


@pytest.mark.parametrize(
    ("call", "launches"),
    [
        (lambda x: x + 1, 1),
        (lambda x: x.view(2, 2).t()[0], 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: torch._foreach_add([x] * 200, 1.0), 2),
        (lambda x: pgd_step_(x.view(2, 2), torch.ones_like(x).view(2, 2), x.clone().view(2, 2), step_size=0.1, eps=0.2),
         3),  # two tensors made here, and the kernel
    ],
)  # fmt: skip
def test_kernels_are_counted(call, launches):
    with pretend_device() as seen:
        x = torch.zeros(4, device=CUDA)
        seen.clear()
        call(x)
        assert seen.count("launch") == launches, seen.table()


def test_two_devices_do_not_mix():
    with pretend_device(), pytest.raises(RuntimeError, match="add got tensors of the host and of the device"):
        torch.ones(3, device=CUDA) + torch.ones(3)


def test_gradients_and_optimizers_are_those_of_the_cpu():
    def train(device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        x = torch.rand(5, 3, 4, 4)
        model.to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
        for _ in range(2):
            optimizer.zero_grad()
            model(x.to(device)).square().sum().backward()
            optimizer.step()
        return [p.detach().cpu() for p in model.parameters()]

    with pretend_device():
        pretended = train(CUDA)
    assert all(torch.equal(a, b) for a, b in zip(pretended, train(torch.device("cpu")), strict=True))


def test_lines_of_the_package_are_named():
    with pretend_device() as seen:
        x = torch.zeros(2, 3, device=CUDA)
        pgd_step_(x, torch.ones_like(x), x.clone(), step_size=0.1, eps=0.2)
        assert isinstance(x, PretendTensor) and "linf_step" in seen.table() and "launch ops/pgd/" in seen.table()
        assert seen.count("launch", without=("ops/pgd/",)) < seen.count("launch")
