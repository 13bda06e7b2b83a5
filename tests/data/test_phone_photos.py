"""faults A: HEIC and AVIF are read where a package for them is there, else named with the way out; EXIF is one rule."""

import io
import sys

import numpy as np
import pytest
from made import chw, contents, encoded, plant
from PIL import Image, features

from poisonshield.data.images import Preparation
from poisonshield.data.importer import import_data
from poisonshield.data.phone_photos import kind_of
from poisonshield.data.pictures import read_picture
from poisonshield.errors import DataError

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


def corner(size=(64, 96)):
    """uint8 [H, W, 3]: one white corner, so that each of eight orientations is another picture."""
    array = np.zeros((*size, 3), np.uint8)
    array[: size[0] // 2, : size[1] // 4] = 255
    return array


def photo(kind, *, orientation=None):
    """A file as Pillow, with pillow-heif, writes it."""
    if kind == "HEIC":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    return encoded(corner(), {"HEIC": "HEIF", "AVIF": "AVIF"}[kind], exif=exif, quality=95)


KINDS = [pytest.param("HEIC"), pytest.param("AVIF", marks=needs_avif)]


@pytest.mark.parametrize("kind", KINDS)
def test_photos_of_phones_are_read_and_stored_as_png(kind, tmp_path):
    plant(tmp_path / "src", {f"a/1.{kind.lower()}": photo(kind), "a/2.png": 0})
    assert import_data(tmp_path / "src", tmp_path / "out")[""].samples == 2
    stored = Image.open(io.BytesIO(contents(tmp_path / "out" / "shard-00000.tar")["a/1.png"]))
    assert np.abs(np.array(stored).astype(int) - corner()).mean() < 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turn_that_exif_asks_for_is_made_once(kind, orientation):
    expected = Image.fromarray(corner())
    if orientation > 1:
        way = dict(zip(range(2, 9), [0, 3, 1, 5, 4, 6, 2], strict=True))[orientation]
        expected = expected.transpose(Image.Transpose(way))
    pixels = read_picture(photo(kind, orientation=orientation)).pixels
    expected = chw(np.array(expected))
    assert pixels.shape == expected.shape and (pixels.int() - expected.int()).abs().float().mean() < 3


def test_a_turn_that_the_reader_of_heic_made_is_not_made_again():
    """Phones write the turn as a property, which libheif follows, and in EXIF too."""
    from poisonshield.data.phone_photos import missed_turn

    class Opened:
        info = {"original_orientation": 6}

    def box(kind, content):
        return (8 + len(content)).to_bytes(4, "big") + kind + content

    plain = box(b"ftyp", b"heic" + bytes(8)) + box(b"meta", bytes(20)) + box(b"mdat", b"irot")
    turned = box(b"ftyp", b"heic" + bytes(8)) + box(b"meta", bytes(4) + box(b"irot", b"\3"))
    assert missed_turn(Opened, plain) == 6 and missed_turn(Opened, turned) == 1


@pytest.mark.parametrize("kind", ["HEIC", "AVIF"])
def test_without_a_package_they_are_named_with_the_way_out(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(features, "check", lambda name: False)
    data = b"\0\0\0\x18ftyp" + kind.lower().encode() + bytes(40)
    package = "pillow-heif" if kind == "HEIC" else "pillow"
    with pytest.raises(
        DataError, match=f"(?s)^k is a {kind} file, one of JPEG.*Export it as PNG.*pip install .*{package}"
    ):
        Preparation()(data, name="k")
    plant(tmp_path / "src", {f"a/1.{kind.lower()}": data, "a/0.png": 0})
    with pytest.raises(DataError, match=f"sample a/1 is a {kind} file"):
        import_data(tmp_path / "src", tmp_path / "out")
    manifest = import_data(tmp_path / "src", tmp_path / "out", skip_broken=True)[""]
    assert "1 broken images left out: a/1" in manifest.provenance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_cut_photo_is_refused_in_words(kind, share):
    data = photo(kind)
    with pytest.raises(DataError, match=f"^k is a {kind} file that cannot be read .*, one of JPEG"):
        read_picture(data[: int(share * len(data))], name="k")


def test_heic_of_more_than_8_bits_is_refused_and_not_cut_off():
    heif = pytest.importorskip("pillow_heif")
    deep = np.random.default_rng(0).integers(0, 65_536, (8, 8, 3), dtype=np.uint16)
    file = io.BytesIO()
    heif.from_bytes("RGB;16", (8, 8), deep.tobytes()).save(file)
    with pytest.raises(DataError, match="^k has more than 8 bits a channel .10 bits"):
        read_picture(file.getvalue(), name="k")


@pytest.mark.parametrize("kind", KINDS)
def test_the_pixel_limit_holds_for_them_too(kind):
    with pytest.raises(DataError, match="claims 96x64 pixels, 6,143 pixels at most"):
        read_picture(photo(kind), max_pixels=6143)


@pytest.mark.parametrize(
    ("brands", "kind"),
    [
        (b"heic\0\0\0\0mif1", "HEIC"),
        (b"mif1\0\0\0\0heic", "HEIC"),
        (b"mif1\0\0\0\0avif", "AVIF"),
        (b"isom\0\0\0\0", ""),
    ],
)
def test_a_kind_is_known_by_its_brands(brands, kind):
    assert kind_of((len(brands) + 8).to_bytes(4, "big") + b"ftyp" + brands + bytes(30)) == kind
    assert kind_of(encoded(corner())) == ""
