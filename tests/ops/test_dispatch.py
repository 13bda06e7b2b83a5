"""What choosing a backend costs a call."""

import importlib.util

import pytest
import torch

from poisonshield.ops import pgd_step_, q_sample


@pytest.mark.parametrize(
    "call",
    [
        lambda x: pgd_step_(x.clone(), x.clone(), x, step_size=0.1, eps=0.1),
        lambda x: q_sample(x, torch.tensor([1]), torch.linspace(0.9, 0.1, 4), seed=0),
    ],
    ids=["a room with all backends", "a room without one"],
)
def test_files_of_backends_are_looked_up_once(call, monkeypatch):
    """Looking for one that is not there cost more than the rest of the choice, in every call."""
    x = torch.rand(1, 3, 4, 4)
    call(x)

    def refuse(name, *rest):
        raise AssertionError(f"{name} is looked up again")

    monkeypatch.setattr(importlib.util, "find_spec", refuse)
    monkeypatch.setattr(importlib, "import_module", refuse)
    call(x)
