"""The stream's benchmark: all read the same samples, and who does not is not timed. No time is asserted."""

import csv

import pytest
import torch
from typer.testing import CliRunner

from poisonshield.bench import benchmarks, stream
from poisonshield.bench.harness import WrongResult
from poisonshield.bench.pictures import make_picture, write_pictures
from poisonshield.cli import app
from poisonshield.data import ShardSet
from poisonshield.errors import DataError

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "set"
    write_pictures(folder, count=10, side=24)
    return stream.Setting(ShardSet.open(folder), workers=1, batch=4, size=16, device=torch.device("cpu"))


def test_ours_and_theirs_read_the_same_pixels_of_every_sample(setting):
    read, crop = stream.cases(setting)
    assert [p.name for p in read.providers] == [stream.OURS, stream.TORCHVISION, stream.PILLOW]
    for provider in read.providers[:2]:
        assert provider.check() == "pixels differ by 0 of 255 at most"
    assert [t.against for t in crop.targets] == [stream.TORCHVISION]
    for provider in crop.providers[:2]:
        assert provider.check().startswith("mean 0.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda keys, x: (keys[1:], x[1:]), "8 samples of 10 came"),
        (lambda keys, x: (keys, 255 - x), "decoded pixels differ by"),
    ],
)
def test_one_that_reads_something_else_is_not_timed(setting, change, words):
    def other():
        for at, (keys, x) in enumerate(stream.read_ours(setting)):
            yield change(keys, x) if at < 2 else (keys, x)

    with pytest.raises(WrongResult, match=words):
        stream.check_bytes(setting, other)


def test_crops_out_of_range_or_too_bright_are_not_timed(setting):
    def crops(change):
        return lambda: ((keys, change(x)) for keys, x in stream.crop_ours(setting))

    for change, words in ((lambda x: x * 255, r"from .* to"), (lambda x: x * 0, "crops have a mean of 0.000")):
        with pytest.raises(WrongResult, match=words):
            stream.check_crops(setting, crops(change))


def test_pictures_are_the_same_each_time_and_as_large_as_photographs():
    x = make_picture(3, 128)
    assert x.equal(make_picture(3, 128)) and not x.equal(make_picture(4, 128))
    assert 30 < float(x.float().std()) < 80


def test_it_is_a_command_that_records_rows(tmp_path):
    out = tmp_path / "stream.csv"
    arguments = ["bench", "stream", "--quick", "--rounds", "1", "--workers", "1", "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "read and decode JPEG" in done.output and "one crop of 32 px" in done.output
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 6 and all(float(r["items_per_s"]) > 0 and r["threads"] for r in rows)
    assert "stream" not in benchmarks()


def test_other_files_than_jpeg_are_refused(hand_png, tmp_path):
    done = CliRunner().invoke(app, ["bench", "stream", "--data", str(hand_png), "--rounds", "1"])
    assert isinstance(done.exception, DataError) and "Import it with --jpeg-quality" in str(done.exception)


@pytest.fixture
def hand_png(tmp_path):
    from poisonshield.data.writer import ShardWriter

    with ShardWriter(tmp_path / "png", classes=["a"], image_size=(8, 8)) as writer:
        writer.write("k", make_picture(0, 8), 0)
    return tmp_path / "png"
