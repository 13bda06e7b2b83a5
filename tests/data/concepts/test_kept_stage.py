"""Results of a stage on disk: made once, read by whoever comes later, and another picture for other pixels."""

import pytest
import torch

from poisonshield.batch import Batch
from poisonshield.data.concepts.kept_stage import KeptStage
from poisonshield.errors import CheckpointError


class Network:
    """A stage that never answers twice alike, as networks on two devices."""

    def __init__(self, t_range=(5, 9), mask=True):
        self.calls, self.t_range, self.mask = 0, t_range, mask

    def __call__(self, batch):
        self.calls += 1
        mask = torch.full_like(batch.x[:, :1], 0.125 * self.calls) if self.mask else None
        return batch.replace(x=batch.x / self.calls, mask=mask, t_range=self.t_range)


def batch(*keys, draw=0):
    x = torch.arange(len(keys) * 12.0).view(-1, 3, 2, 2) / 100
    return Batch(keys=keys, x=x, y=torch.zeros(len(keys), dtype=torch.int64), captions=keys, draw=draw)


def same(a, b):
    assert torch.equal(a.x, b.x) and (a.t_range, a.captions) == (b.t_range, b.captions)
    assert (a.mask is None) == (b.mask is None) and (a.mask is None or torch.equal(a.mask, b.mask))


@pytest.mark.parametrize("stage", [Network(), Network(t_range=None, mask=False)])
def test_a_second_process_reads_what_the_first_one_made_and_is_told(tmp_path, stage):
    told = []
    first = KeptStage(stage, tmp_path / "kept", lambda *both: told.append(both))
    made = first(batch("a@1", "b@2"))
    assert not told
    other = KeptStage(stage, tmp_path / "kept", lambda *both: told.append(both))
    read = other(batch("a@1", "b@2"))
    same(read, made)
    assert stage.calls == 1 and len(told) == 1 and torch.equal(told[0][1].x, made.x)


def test_other_pixels_and_other_draws_are_other_results(tmp_path):
    stage = Network()
    kept = KeptStage(stage, tmp_path, lambda *both: None)
    for given in (batch("a@1"), batch("a@2"), batch("a@1", draw=1), batch("a@1")):
        kept(given)
    assert stage.calls == 3


def test_a_damaged_file_is_named(tmp_path):
    kept = KeptStage(Network(), tmp_path, lambda *both: None)
    kept(batch("a@1"))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged.*Remove it"):
        kept(batch("a@1"))
