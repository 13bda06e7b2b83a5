"""Small tensors that go to a device and come back without making the host stand still."""

import torch
from pretend_device import CUDA, PretendTensor, pretend_device

from poisonshield.attacks import ChannelLinf
from poisonshield.batch import Batch
from poisonshield.losses.infonce import infonce
from poisonshield.transfer import Letter, send


def test_what_is_sent_arrives_and_nobody_waits():
    host = torch.arange(5)
    with pretend_device() as seen:
        there = send(host, CUDA)
        assert isinstance(there, PretendTensor) and send(there, CUDA) is there
        assert (seen.count("copy"), seen.count("wait")) == (1, 0)
        assert torch.equal(there.cpu(), host)
    assert send(host, torch.device("cpu")) is host


def test_letter_waits_when_it_is_read_and_not_before():
    with pretend_device() as seen:
        letter = Letter(torch.ones(3, device=CUDA) > 0)
        assert seen.count("wait") == 0
        assert letter.read() == [True, True, True] and seen.count("wait") == 1
    assert Letter(torch.tensor([True, False])).read() == [True, False]


def test_ids_losses_and_radii_are_made_without_a_wait():
    batch = Batch(("a", "b", "c"))
    with pretend_device() as seen:
        views = tuple(torch.rand(3, 4).to(CUDA) for _ in range(2))
        x, budget = torch.full((3, 3, 2, 2), 0.5, device=CUDA), ChannelLinf(0.1, (1.0, 0.5, 2.0))
        budget.measure(x)  # the first use makes the radii
        seen.clear()
        rng = batch.random(1, CUDA)
        infonce(views)
        budget.start_(x.clone(), x, rng, "start")
        budget.measure(x)
        assert seen.count("wait") == 0, seen.table()
        assert rng.ids.tolist() == batch.random(1).ids.tolist()
