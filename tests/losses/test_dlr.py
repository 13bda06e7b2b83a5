"""The difference of logits ratio against a slow loop and AutoAttack's own."""

import pytest
import torch
from torch import nn

from poisonshield.errors import ShapeError
from poisonshield.losses.dlr import dlr


def slow(scores, y, target=None):
    """One sample at a time, as the paper writes it."""
    out = []
    for i, row in enumerate(scores.tolist()):
        order = sorted(row, reverse=True)
        if target is None:
            others = max(z for k, z in enumerate(row) if k != y[i])
            out.append(-(row[y[i]] - others) / (order[0] - order[2]))
        else:
            out.append(-(row[y[i]] - row[target[i]]) / (order[0] - (order[2] + order[3]) / 2))
    return torch.tensor(out, dtype=torch.float64)


def example():
    torch.manual_seed(0)
    scores, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 6, (40,))
    y[:20] = scores[:20].argmax(1)
    return scores, y, (y + torch.randint(1, 6, (40,))) % 6


def test_it_is_what_the_paper_writes():
    scores, y, target = example()
    torch.testing.assert_close(dlr(scores, y), slow(scores, y))
    torch.testing.assert_close(dlr(scores, y, target=target), slow(scores, y, target))


def test_autoattack_agrees():
    torchattacks = pytest.importorskip("torchattacks")
    scores, y, target = example()
    plain, targeted = torchattacks.APGD(nn.Identity()), torchattacks.APGDT(nn.Identity())
    torch.testing.assert_close(dlr(scores, y), plain.dlr_loss(scores, y))
    torch.testing.assert_close(dlr(scores, y, target=target), targeted.dlr_loss_targeted(scores, y, target))


def test_it_is_positive_where_the_sample_is_misclassified_and_blind_to_scale():
    scores, y, _ = example()
    assert torch.equal(dlr(scores, y) > 0, scores.argmax(1) != y)
    torch.testing.assert_close(dlr(1000 * scores, y), dlr(scores, y))


def test_its_gradient_is_right():
    scores, y, target = example()
    scores = scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dlr(s, y), scores)
    assert torch.autograd.gradcheck(lambda s: dlr(s, y, target=target), scores)


def test_equal_scores_give_no_nan():
    assert torch.equal(dlr(torch.zeros(2, 4), torch.tensor([0, 1])), torch.zeros(2))


def test_too_few_classes_are_refused():
    with pytest.raises(ShapeError, match="at least 3 classes"):
        dlr(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ShapeError, match="at least 4 classes"):
        dlr(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), target=torch.ones(2, dtype=torch.long))
