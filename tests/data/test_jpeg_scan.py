"""faults A: half a JPEG with an end mark, and random bytes as its scan, decode as sound. Here they are told apart."""

import io

import numpy as np
import pytest
from made import array_of, contents, encoded, plant
from PIL import Image

from poisonshield.data.decode import decode
from poisonshield.data.images import Preparation
from poisonshield.data.importer import import_data
from poisonshield.errors import DataError


def photo(size=(96, 128), seed=0):
    """uint8 [H, W, 3] with large shapes and a little noise, as photographs have."""
    y, x = np.mgrid[: size[0], : size[1]]
    waves = np.stack([np.sin(x / 19) * np.cos(y / 17), np.cos(x / 15 + y / 31), np.sin(y / 16 - x / 23)], axis=2)
    noise = np.random.default_rng(seed).normal(0, 4, (*size, 3))
    return (127 + 100 * waves + noise).clip(0, 255).astype(np.uint8)


KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "4:4:4": {"subsampling": 0},
    "optimized": {"optimize": True},
    "restarts": {"restart_marker_rows": 1},
    "short restarts": {"restart_marker_blocks": 3},
    "coarse": {"quality": 5},
    "fine": {"quality": 100},
}


def jpeg(pixels, **settings):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, "JPEG", **settings)
    return file.getvalue()


def scan_of(data):
    """(start, end) of the compressed data of the last scan, up to the end mark."""
    at = data.rindex(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"), data.rindex(b"\xff\xd9")


def refused(data):
    with pytest.raises(DataError, match="^k: .* are not a whole JPE?G image"):
        Preparation()(data, name="k")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(96, 128), (33, 17), (8, 8), (1, 1), (15, 250)])
def test_whole_jpegs_of_every_kind_pass_with_their_bytes_and_in_silence(kind, size, capfd):
    data = jpeg(photo(size), **KINDS[kind])
    assert Preparation()(data, name="k").data == data
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [0, 127, 128, 255])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_flat_pictures_of_which_hardly_a_byte_matters_pass(value, mode, progressive):
    """Grey is also what a decoder fills in where data is missing."""
    for size in ((1, 1), (16, 16), (300, 400)):
        data = jpeg(Image.fromarray(np.full((*size, 3), value, np.uint8)).convert(mode), progressive=progressive)
        assert Preparation()(data, name="k").size == size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.03, 0.3, 0.5, 0.9])
def test_part_of_a_jpeg_with_an_end_mark_is_refused(kind, share):
    data = jpeg(photo(), **KINDS[kind])
    start, end = scan_of(data)
    refused(data[: start + int(share * (end - start))].rstrip(b"\xff") + b"\xff\xd9")


@pytest.mark.parametrize("kind", [k for k in KINDS if "restart" not in k])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("marks", [False, True], ids=["without marks", "with marks"])
def test_random_bytes_as_a_scan_are_refused(kind, seed, marks):
    data = jpeg(photo(), **KINDS[kind])
    start, end = scan_of(data)
    noise = np.random.default_rng(seed).bytes(end - start)
    refused(data[:start] + (noise if marks else noise.replace(b"\xff", b"\x7f")) + data[end:])


@pytest.mark.parametrize("kind", KINDS)
def test_further_bytes_behind_whole_data_are_refused_unless_they_are_few_or_zeros(kind):
    data = jpeg(photo(), **KINDS[kind])
    end = data.rindex(b"\xff\xd9")
    noise = np.random.default_rng(0).bytes(500).replace(b"\xff", b"\x01")
    refused(data[:end] + noise + data[end:])
    for padding in (bytes(2000), noise[:3]):
        assert Preparation()(data[:end] + padding + data[end:], name="k").size == (96, 128)
    assert Preparation()(data + noise, name="k").size == (96, 128)  # behind the end mark is not in the picture


def test_restart_marks_that_are_missing_or_out_of_order_are_refused():
    data = jpeg(photo(), restart_marker_rows=1)
    start, _ = scan_of(data)
    second = data.index(b"\xff\xd1", start)
    refused(data[:second] + b"\xff\xd5" + data[second + 2 :])
    refused(data[: data.index(b"\xff\xd0", start)] + data[second:])


def test_a_progressive_jpeg_without_its_last_scans_is_refused():
    data = jpeg(photo(), progressive=True)
    refused(data[: data.rindex(b"\xff\xda")] + b"\xff\xd9")


def test_a_small_file_that_claims_many_pixels_is_refused_before_they_are_made(monkeypatch):
    data = bytearray(jpeg(array_of(size=(8, 8))))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = (8000).to_bytes(2, "big") + (16_000).to_bytes(2, "big")
    monkeypatch.setattr("torchvision.io.decode_jpeg", None)
    with pytest.raises(DataError, match="it claims 128,000,000 pixels, more than so few bytes can hold"):
        Preparation()(bytes(data), name="k")


def test_damaged_jpegs_are_named_by_import_and_left_out_when_asked_to(tmp_path):
    whole = jpeg(photo())
    start, end = scan_of(whole)
    files = {
        "a/whole.jpg": whole,
        "a/half.jpg": whole[: len(whole) // 2] + b"\xff\xd9",
        "a/random.jpg": whole[:start] + np.random.default_rng(1).bytes(end - start) + whole[end:],
    }
    plant(tmp_path / "src", files)
    with pytest.raises(DataError, match=r"(?s)^2 images cannot be decoded.*sample a/half.*sample a/random"):
        import_data(tmp_path / "src", tmp_path / "out")
    manifest = import_data(tmp_path / "src", tmp_path / "out", skip_broken=True)[""]
    assert "2 broken images left out: a/half, a/random" in manifest.provenance
    assert contents(tmp_path / "out" / "shard-00000.tar")["a/whole.jpg"] == whole


def test_the_decoder_alone_takes_half_a_jpeg_for_sound():
    """Else none of this were needed."""
    whole = encoded(photo(), "JPEG")
    assert decode(whole[: len(whole) // 2] + b"\xff\xd9", "jpg", name="k").shape == (3, 96, 128)
