"""A step that is overdue is told with the ranks that have not come, and those that give no sign of life."""

import logging
import threading
import time

import pytest
import torch.distributed as dist

from poisonshield.engine import watch as watches
from poisonshield.engine.meeting import Meeting
from poisonshield.engine.watch import Watch


@pytest.fixture
def quick(monkeypatch, caplog):
    """Seconds become hundredths."""
    monkeypatch.setattr(watches, "SIGN_EVERY_S", 0.05)
    monkeypatch.setattr(watches, "LEAST_S", 0.3)
    caplog.set_level(logging.WARNING)
    return dist.HashStore()


def test_one_process_watches_nothing(caplog):
    before = threading.active_count()
    watch = Watch(None, 20)
    with watch.on(), watch.at(1):
        assert threading.active_count() == before


def test_rank_that_waits_for_its_data_and_one_that_is_silent_are_named(quick, caplog):
    late, silent, first = (Watch(Meeting(quick, rank, 3), 2) for rank in (1, 2, 0))
    with silent.on(), silent.at(7):
        time.sleep(0.12)
    with late.on(), first.on():
        with late.at(6), first.at(6):
            pass
        with first.at(7):
            time.sleep(0.9)
    (told, *more) = caplog.messages
    assert told.startswith("step 7 has taken 0 s since ") and len(more) <= 1  # then only after twice the time
    assert "rank 1 on " in told and "still before step 7" in told
    assert "rank 2 on " in told and "gives no sign of life" in told and "rank 0 on" not in told


def test_steps_of_the_usual_length_are_not_told(quick, caplog):
    watch = Watch(Meeting(quick, 0, 2), 3)
    with watch.on():
        for step in range(4):
            with watch.at(step + 1):
                time.sleep(0.2)
        time.sleep(0.5)  # between steps nobody is waited for: an evaluation, a checkpoint
        with watch.at(5):
            time.sleep(0.45)
    assert caplog.messages == []
