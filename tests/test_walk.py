"""What a command and a training step walk through: few files, and nobody below calls somebody above but by contract.

Before the experiments became one protocol (commit d87ccfa) the same two walks were: print-config 18 files, 38 moves
between files, 9 climbs; a VESPR step 20 files, 50 moves, 2 climbs. Followed by reading instead, `config` of that
commit's `train` went through 53 files with 41 climbs, as either half could have been meant at every fork; what runs was
never that tangled. The numbers of today: `python tests/walk.py`.
"""

from pathlib import Path

import pytest
from walk import WORKS, floor_of, follow

BY_CONTRACT = {
    "config": "pydantic calls the validators of the Config that it checks",
    "attacks": "an attack calls the objective that it was given",
    "ops": "a loss calls itself again outside autocast",
}
"""Rooms that may call upwards, since they were handed what they call."""


@pytest.mark.parametrize(("name", "files"), [("print-config", 34), ("vespr-step", 27)])
def test_a_walk_is_short_and_climbs_by_contract_alone(name, files):
    import poisonshield

    found = follow(WORKS[name](), Path(poisonshield.__file__).parent)
    assert 5 < len(found.files) <= files, found.describe()
    climbing = {low.split("/")[0] for low, _ in found.climbs}
    assert climbing <= set(BY_CONTRACT), found.climbs


def test_a_climb_is_seen(tmp_path):
    (tmp_path / "errors.py").write_text("def low(call):\n    return call()\n")
    (tmp_path / "runs.py").write_text("def high():\n    return 1\n")
    rooms = {}
    for file in ("errors.py", "runs.py"):
        exec(compile((tmp_path / file).read_text(), str(tmp_path / file), "exec"), rooms)
    found = follow(lambda: rooms["low"](rooms["high"]), tmp_path)
    assert found.climbs == {("errors.py", "runs.py"): 1} and floor_of("runs.py") == 5
