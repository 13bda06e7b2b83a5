"""Two ranks for several files: starting them takes as long as most of what they are asked."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dist import run_dist

from engine.ranks import run_each


class Answers(NamedTuple):
    """What the two ranks left in their folder, and what each of them answered."""

    folder: Path
    ranks: list[Any]


@pytest.fixture(scope="session")
def ask_two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Answers]:
    """`ask_two_ranks(__name__)`: the Answers to the asking file's `two_ranks(rank, world, folder)`.

    The first file to ask starts the ranks for all collected files that will; in a run spread over workers, for itself.
    """
    known: dict[str, Answers] = {}

    def ask(asking: str) -> Answers:
        if asking not in known:
            users = [item.module.__name__ for item in request.session.items if "ask_two_ranks" in item.fixturenames]
            names = [asking] if "PYTEST_XDIST_WORKER" in os.environ else dict.fromkeys([asking, *users])
            folders = {name: tmp_path_factory.mktemp(name.rpartition(".")[2]) for name in names if name not in known}
            answers = run_dist(run_each, 2, folders, timeout_s=400)
            known.update({name: Answers(folder, [a[name] for a in answers]) for name, folder in folders.items()})
        return known[asking]

    return ask
