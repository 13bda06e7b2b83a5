"""Which run of a stage the pictures of an epoch come from, and how many runs are kept."""

import pytest
import torch

from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.data.concepts.staged import StagedConcepts


def concepts(count=2):
    picture = lambda i: ConceptImage.of("cup", str(i), torch.full((3, 4, 4), 10 * i, dtype=torch.uint8))
    return [Concept.of("cup", [picture(i) for i in range(count)])]


def noted(**settings):
    """Runs of a stage that notes each epoch and draw that it is asked for."""
    calls = []

    def stage(batch):
        calls.append((batch.epoch, batch.draw))
        return batch

    return StagedConcepts(
        concepts(), stage, **({"per_epoch": True, "variants": None, "captions": False} | settings)
    ), calls


@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        ({"per_epoch": False}, [0, 0, 0, 0, 0, 0]),
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"variants": 2}, [0, 1, 0, 1, 0, 1]),
    ],
)
def test_epochs_come_from_the_runs_that_the_drawing_shows(settings, runs):
    staged, calls = noted(**settings)
    assert [staged.run_of(epoch) for epoch in range(6)] == runs
    for epoch in range(6):
        staged.of(0, epoch)
    assert calls == [(run, run) for run in sorted(set(runs))]  # each once


def test_without_a_stage_there_is_one_run():
    staged = StagedConcepts(concepts(), None, per_epoch=True, variants=None, captions=False)
    assert staged.of(0, 0) is staged.of(0, 7)


def test_runs_that_do_not_come_again_are_dropped():
    staged, calls = noted()
    for epoch in range(6):
        staged.of(0, epoch)
    before = len(calls)
    for epoch in (0, 4, 5):  # the first tells what a position belongs to, a step may lie on two epochs
        staged.of(0, epoch)
    assert len(calls) == before
    staged.of(0, 2)
    assert len(calls) == before + 1
