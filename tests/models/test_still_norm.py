"""Batch norm that gives gradients to pixels alone: to the bit what torch gives them, and torch's own again after."""

import pytest
import torch
from tiny import tiny_batch
from torch import nn

from poisonshield.defenses.base import Context
from poisonshield.defenses.vespr import VESPR
from poisonshield.methods.simclr import SimCLR
from poisonshield.models.backbones import BackboneConfig, build_encoder
from poisonshield.models.batchnorm import SyncedBatchNorm, input_gradients_only


def norm_of(kind, channels, affine=True):
    torch.manual_seed(3)
    norm = kind(channels, affine=affine).eval()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.01, 3)
        if affine:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm2d, (5, 7, 9, 4)),
        (SyncedBatchNorm, (3, 16, 8, 8)),
        (nn.BatchNorm1d, (6, 5)),
        (nn.BatchNorm2d, (0, 2, 3, 3)),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_input_gradients_are_torchs_to_the_bit(kind, shape, affine, layout):
    norm, x = norm_of(kind, shape[1], affine), torch.randn(shape)
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    found = []
    for ours in (False, True):
        leaf = x.clone().requires_grad_()
        with input_gradients_only(*[norm] * ours):
            y = norm(leaf)
            (grad,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), leaf)
        found.append((y.detach(), grad))
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*found, strict=True))


def test_weights_get_no_gradient_inside_and_get_theirs_after():
    norm, x = norm_of(nn.BatchNorm2d, 3), torch.randn(2, 3, 4, 4, requires_grad=True)
    with input_gradients_only(norm):
        norm(x).sum().backward()
        assert norm.weight.grad is None and x.grad is not None
    norm(x).sum().backward()
    assert norm.weight.grad is not None and "forward" not in vars(norm)


def test_training_mode_half_precision_and_exceptions_leave_torchs_own():
    norm = norm_of(nn.BatchNorm2d, 3)
    with input_gradients_only(norm):
        assert norm(torch.randn(2, 3, 4, 4).bfloat16()).dtype == torch.bfloat16
        norm.train()
        norm(torch.randn(2, 3, 4, 4)).sum().backward()
        assert norm.weight.grad is not None and norm.num_batches_tracked == 1
    with pytest.raises(ZeroDivisionError), input_gradients_only(norm.eval()):
        1 / 0  # noqa: B018
    assert "forward" not in vars(norm)


def test_second_gradients_are_those_of_an_affine_map():
    norm, x = norm_of(nn.BatchNorm2d, 3), torch.randn(2, 3, 4, 4, requires_grad=True)
    with input_gradients_only(norm):
        (grad,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    assert torch.allclose(torch.autograd.grad(grad.sum(), x)[0], 2 * second(norm, x))


def second(norm, x):
    """d/dx of the sum of f'(x) for f = sum of squares of an affine map with factor a a channel: 2 a^2, halved."""
    a = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (a**2).view(1, -1, 1, 1).expand_as(x)


def test_attack_on_a_real_network_is_the_same_to_the_bit(monkeypatch):
    from contextlib import nullcontext

    from poisonshield.defenses import vespr

    torch.manual_seed(0)
    encoder = build_encoder(BackboneConfig(name="resnet_mini", widths=(8, 8, 16, 16)))
    method = SimCLR(SimCLR.Config(hidden=12, out=10), encoder=encoder, num_classes=4)
    model = VESPR(VESPR.Config(attack={"steps": 4}), Context(5, 4)).wrap(method).train()
    batch = tiny_batch(6, side=16)
    ours = model.attacked(batch.views[0], 0, batch)
    monkeypatch.setattr(vespr, "input_gradients_only", lambda *modules: nullcontext())
    assert torch.equal(ours, model.attacked(batch.views[0], 0, batch))
