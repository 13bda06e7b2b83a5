"""Ranks that were not told the same are refused in words on every rank, late ones are named.

Threads stand for ranks.
"""

import datetime
import logging
import threading

import torch.distributed as dist

from poisonshield.engine import meeting as meetings
from poisonshield.engine.meeting import Meeting, compare, current, taking_part
from poisonshield.errors import BackendError, ConfigError


def on_ranks(*works, world=None, timeout_s=20):
    """What each work answers or raises, one thread and one rank each, over one store."""
    store, answers = dist.HashStore(), {}
    store.set_timeout(datetime.timedelta(seconds=timeout_s))

    def run(rank, work):
        try:
            answers[rank] = work(Meeting(store, rank, world or len(works)))
        except Exception as err:
            answers[rank] = err

    threads = [threading.Thread(target=run, args=item) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    return [answers[rank] for rank in range(len(works))]


def test_ranks_that_were_told_the_same_go_on():
    facts = {"optimizer.lr": 0.1, "digest of data.train": "ab", "data.poison": None}
    same = lambda meeting: (meeting.agree(facts), meeting.agree({"again": [1, 2]}))
    assert on_ranks(same, same, same) == [(None, None)] * 3


def test_every_rank_hears_who_differs_and_in_what():
    told = {"optimizer.lr": 0.1, "seed": 1}
    answers = on_ranks(
        lambda m: m.agree(told),
        lambda m: m.agree(told),
        lambda m: m.agree({**told, "optimizer.lr": 0.2}),
        lambda m: m.agree({"optimizer.lr": 0.1, "extra": "x"}),
    )
    assert all(type(a) is ConfigError for a in answers) and len({str(a) for a in answers}) == 1
    lines = str(answers[0]).splitlines()
    assert [line.split(" on ")[0].strip() for line in lines[1:3]] == ["rank 2", "rank 3"]
    assert lines[1].endswith("optimizer.lr is 0.2, and 0.1 on rank 0")
    assert lines[2].endswith('seed is absent, and 1 on rank 0, extra is "x", and absent on rank 0')


def test_rank_that_does_not_come_is_named_while_others_wait(monkeypatch, caplog):
    monkeypatch.setattr(meetings, "SAY_EVERY_S", 0.2)
    caplog.set_level(logging.WARNING)
    wait = lambda m: m.gather("here", "they came")
    answers = on_ranks(wait, wait, world=4, timeout_s=1)
    assert [type(a) for a in answers] == [BackendError] * 2
    assert "2 of 4 processes (rank 2, 3) did not come within" in str(answers[0])
    assert 2 <= len(caplog.messages) <= 5  # of rank 0 alone
    assert caplog.messages[0].startswith("rank 0 waits for 2 of 4 processes (rank 2, 3) since ")
    assert "unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT" in caplog.messages[0]


def test_ranks_that_count_differently_are_refused_at_once():
    def come(m):
        m.refuse_wrong_numbers()
        m.gather("here", "they came")

    wrong = lambda m: come(Meeting(m.store, 1, 3))
    for answer in on_ranks(come, wrong):
        assert type(answer) is ConfigError
        assert "rank 1 on " in str(answer) and "counts WORLD_SIZE=3 processes, and rank 0 on " in str(answer)


def test_two_processes_of_one_rank_are_refused():
    def twin(m):
        Meeting(m.store, 0, 2).refuse_wrong_numbers()
        m.refuse_wrong_numbers()

    (answer,) = on_ranks(twin)
    assert type(answer) is ConfigError and "two processes call themselves rank 0: " in str(answer)


def test_differences_are_told_key_by_key():
    assert compare({"a": "1"}, {"a": "1"}) == ""
    assert compare({"a": "1", "b": "2"}, {"a": "3", "b": "2"}) == "a is 3, and 1 on rank 0"


def test_the_meeting_is_known_while_the_process_takes_part():
    one = Meeting(dist.HashStore(), 0, 1)
    assert current() is None
    with taking_part(one):
        assert current() is one
    assert current() is None
