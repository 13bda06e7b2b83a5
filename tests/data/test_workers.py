"""Reading by workers: pixels are lent in slots that are written over, and bytes may go as far as the first stage."""

import os
import time
from itertools import islice

import pytest
import torch

from poisonshield.batch import Batch
from poisonshield.data import ResidentSource, ShardSet, ShardStream
from poisonshield.data.source import batch_of
from poisonshield.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from poisonshield.data.writer import ShardWriter

    made = tmp_path_factory.mktemp("data") / "set"
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(made, classes=["a", "b"], image_size=(4, 6), samples_per_shard=8) as writer:
        for i in range(23):
            writer.write(f"k{i:02d}", torch.randint(0, 256, (3, 4, 6), generator=generator).to(torch.uint8), i % 2)
    return made


@pytest.fixture
def source(folder):
    return ShardSet.open(folder)


class Sums:
    """A stage that takes bytes: keeps their sums and lets the pixels go."""

    def __init__(self):
        self.found = []

    def __call__(self, batch: Batch) -> Batch:
        self.found.append((batch.keys, batch.x.dtype, batch.x.long().sum((1, 2, 3)).tolist()))
        return batch.replace(views=(batch.x.float() / 255,))


def taken(source, count, **settings):
    stage = Sums()
    iterator = iter(ShardStream(source, batch_size=5, seed=1, stages=(stage,), keep_bytes=True, **settings))
    views = []
    for batch in islice(iterator, count):
        time.sleep(0.002)  # workers read ahead as far as they may
        views.append(batch.views[0])
    iterator.close()
    return stage.found, torch.cat(views)


@pytest.mark.parametrize("kind", ["shards", "resident"])
@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_that_workers_lend_are_those_read_without_them(source, kind, workers):
    read_from = ResidentSource(source) if kind == "resident" else source
    (sums, views), (plain, same) = taken(read_from, 40, workers=workers), taken(source, 40)
    assert sums == plain and views.equal(same)
    assert {dtype for _, dtype, _ in sums} == {torch.uint8}


@pytest.mark.parametrize("workers", [0, 2])
def test_float_batches_may_be_kept_while_slots_are_written_over(source, workers):
    iterator = iter(ShardStream(source, batch_size=4, seed=3, workers=workers))
    batches = list(islice(iterator, 30))
    iterator.close()
    for batch in batches:
        wanted = source.read(torch.tensor([source.keys.index(k) for k in batch.keys]))
        assert batch.x.equal(wanted / 255) and batch.x.is_contiguous()


def test_pixels_become_floats_of_the_usual_memory_whatever_the_readers(source):
    pixels = source.read(torch.arange(4))
    for same in (pixels, pixels.contiguous()):
        x = batch_of(source, torch.arange(4), same).x
        assert x.is_contiguous() and x.equal(pixels.float() / 255)
    assert batch_of(source, torch.arange(4), pixels, keep_bytes=True).x.equal(pixels)


def test_bytes_go_no_further_than_the_first_stage(source):
    later = []
    stages = (lambda batch: batch.replace(views=(batch.x.float(),)), lambda batch: later.append(batch.x) or batch)
    batch = next(iter(ShardStream(source, batch_size=5, seed=1, stages=stages, keep_bytes=True)))
    assert batch.x is None and later == [None] and len(batch.views[0]) == 5


def test_bytes_without_a_stage_that_takes_them_are_refused(source):
    with pytest.raises(ConfigError, match="there is none"):
        ShardStream(source, batch_size=5, seed=1, keep_bytes=True)


def test_time_in_stages_is_told_from_time_in_reading(source):
    def slow(batch: Batch) -> Batch:
        time.sleep(0.02)
        return batch

    stream, plain = (ShardStream(source, batch_size=5, seed=1, stages=stages) for stages in ((slow,), ()))
    for each in (stream, plain):
        list(islice(iter(each), 3))
    assert stream.stage_seconds >= 0.06 and plain.stage_seconds < 0.02


def test_shared_memory_is_not_made_for_a_size_that_images_do_not_have(source, monkeypatch):
    monkeypatch.setattr(source, "image_size", (60_000, 60_000))
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", None)
    with pytest.raises(DataError, match="is 4x6 pixels, the manifest says 60000x60000"):
        next(iter(ShardStream(source, batch_size=5, seed=1, workers=1)))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a system without posix_fadvise")
def test_a_batch_is_asked_of_the_disk_in_the_order_of_the_files(source, monkeypatch):
    asked, read = [], []
    pread = os.pread
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: asked.append((offset, length)))
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: read.append((offset, n)) or pread(fd, n, offset))
    files = source.encoded(torch.tensor([20, 3, 9, 1, 17, 8]))
    index = source.index
    in_order = [(int(index.offset[i]), int(index.length[i])) for i in (1, 3, 8, 9, 17, 20)]
    assert asked == read == in_order
    assert [len(data) for data in files] == [int(index.length[i]) for i in (20, 3, 9, 1, 17, 8)]
