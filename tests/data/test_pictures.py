"""The one door to picture files: which formats pass, what is turned, and what is refused before anything is decoded."""

import ast
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from made import array_of, disc, encoded, plant
from PIL import Image, ImageOps

import poisonshield
from poisonshield.data.decode import decode
from poisonshield.data.images import Preparation
from poisonshield.data.importer import import_data
from poisonshield.data.masks import read_mask
from poisonshield.data.pictures import (
    ENDINGS,
    FORMATS,
    MAX_PIXELS,
    find_pictures,
    is_picture,
    read_head,
    read_picture,
    turn,
    walk_files,
)  # fmt: skip
from poisonshield.data.shards import ShardSet
from poisonshield.errors import DataError

ORIENTATIONS = range(1, 9)


def oriented(array, orientation, kind="JPEG", **settings):
    """A file whose EXIF data asks for a turn."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(array, kind, exif=exif, **settings)


def shown(data):
    """uint8 [H, W, 3] as Pillow shows it."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def jpeg_claiming(width, height):
    """A whole little JPEG whose frame header claims another size."""
    data = bytearray(encoded(array_of(size=(8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_of_the_list_is_read_as_pillow_reads_it(kind, tmp_path):
    (tmp_path / f"a{FORMATS[kind][0]}").write_bytes(encoded(array_of(size=(9, 7)), kind))
    (path,) = find_pictures(tmp_path)
    picture = read_picture(path)
    assert (picture.format, picture.frames, picture.alpha) == (kind, 1, None)
    assert np.array_equal(picture.pixels.permute(1, 2, 0).numpy(), shown(path.read_bytes()))


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI", "EPS"])
def test_other_formats_are_refused_whatever_the_name(kind, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(array_of(size=(16, 16)), kind))
    with pytest.raises(DataError, match="a.png: .* not a whole JPEG, PNG, .* or PPM image .it begins as none"):
        read_picture(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.mask.png"])
def test_postscript_starts_no_program(name, tmp_path, monkeypatch):
    """Pillow renders it by starting Ghostscript, which runs what the file says."""
    started = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda self, *a, **k: started.append(a))
    monkeypatch.setattr("os.system", started.append)
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n%%EOF\n"
    path = plant(tmp_path, {f"set/{name}": data}) / "set" / name
    tries = [
        lambda: read_picture(path),
        lambda: read_mask(path, name=name, size=(8, 8)),
        lambda: Preparation()(data, name=name),
        lambda: import_data(tmp_path, tmp_path.with_name("out")),
    ]
    for attempt in tries:
        with pytest.raises(DataError, match="begins as none"):
            attempt()
    assert not started


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "attempt",
    [
        lambda data: read_picture(data, name="k"),
        lambda data: read_head(data, name="k"),
        lambda data: Preparation()(data, name="k"),
        lambda data: Preparation(size=8)(data, name="k"),
        lambda data: decode(data, "jpg", name="k"),
        lambda data: read_mask(data, name="k", size=(8, 8)),
    ],
)
def test_a_small_file_that_claims_many_pixels_is_refused_before_it_is_decoded(attempt, monkeypatch):
    data = jpeg_claiming(16_000, 16_000)
    assert len(data) < 2000
    monkeypatch.setattr("torchvision.io.decode_jpeg", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(DataError, match="k (claims 16000x16000|is too large: Image size .256000000)"):
        attempt(data)


def test_the_limit_is_an_argument():
    data = encoded(array_of(size=(20, 30)))
    assert read_picture(data, max_pixels=600).pixels.shape == (3, 20, 30) and MAX_PIXELS == 2**27
    with pytest.raises(DataError, match="claims 30x20 pixels, 599 pixels at most"):
        read_picture(data, max_pixels=599)


def test_jpegs_with_stuffed_or_unusual_markers_pass_the_limit():
    """The walk over the markers must come through what encoders write, or leave it to the decoder."""
    plain = encoded(array_of(size=(8, 8)), "JPEG")
    for data in (
        plain, encoded(array_of(size=(8, 8)), "JPEG", progressive=True),
        plain[:2] + b"\xff\xff" + plain[3:], plain[:2] + b"\xff\xfe\x00\x05abc" + plain[2:],
    ):  # fmt: skip
        assert decode(data, "jpg", name="k").shape == (3, 8, 8)
    with pytest.raises(DataError, match="claims"):
        claims = jpeg_claiming(60_000, 60_000)
        decode(claims[:2] + b"\xff\xff\xff" + claims[3:], "jpg", name="k")


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_turn_does_what_pillow_does(orientation):
    array = array_of(size=(4, 7))
    data = oriented(array, orientation, "PNG")
    ours = turn(torch.from_numpy(array).permute(2, 0, 1), orientation)
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), shown(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_pictures_are_turned_as_exif_says_and_stay_so_when_asked(kind, orientation):
    data = oriented(array_of(size=(8, 16)), orientation, kind)
    assert np.array_equal(read_picture(data).pixels.permute(1, 2, 0).numpy(), shown(data))
    if kind != "TIFF":  # Pillow turns it while it reads
        assert read_picture(data, upright=False).pixels.shape == (3, 8, 16)


def test_masks_are_turned_as_their_own_exif_says():
    mask = disc(20, 30)
    mask[:, :5] = 255
    read = np.array(read_mask(oriented(mask, 6, "PNG"), name="m", size=(20, 30)))
    assert np.array_equal(read, np.rot90(mask, -1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_import_bakes_the_turn_in_without_loss_and_keeps_the_bytes_of_others(kind, tmp_path):
    upright, turned = (oriented(array_of(size=(8, 16)), o, kind, quality=90) for o in (1, 6))
    ending = FORMATS[kind][0]
    plant(tmp_path / "src", {f"a/up{ending}": upright, f"a/turned{ending}": turned})
    import_data(tmp_path / "src", tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out")
    at = {key: i for i, key in enumerate(shards.keys)}
    stored = shards.encoded(torch.tensor([at["a/up"], at["a/turned"]]))
    assert (stored[0] == upright) == (kind != "WEBP")
    assert Image.open(io.BytesIO(stored[1])).format == "PNG"
    assert np.array_equal(shards.decode(at["a/turned"]).permute(1, 2, 0).numpy(), np.rot90(shown(upright), -1))
    assert "EXIF" in shards.manifest.provenance


@pytest.mark.parametrize("size", [6, 20])
def test_a_resized_import_is_turned_first(size):
    turned = Preparation(size=size)(oriented(array_of(size=(8, 16)), 8, "PNG"), name="k")
    upright = Preparation(size=size)(encoded(np.rot90(array_of(size=(8, 16))).copy()), name="k")
    assert turned == upright


def test_broken_exif_data_asks_for_nothing():
    data = encoded(array_of(size=(8, 16)), "JPEG", exif=b"Exif\0\0nonsense")
    assert read_picture(data).pixels.shape == (3, 8, 16)
    assert Preparation()(data, name="k").data == data


def ppm(maximum):
    return b"P6 2 1 %d\n" % maximum + bytes(range(12 if maximum > 255 else 6))


def deep_tiff():
    """A TIFF of three 16-bit channels, written by hand: Pillow reads it as 8 bits and says nothing."""
    entries = [
        (256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 8 + 2 + 9 * 12 + 4), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 8 + 2 + 9 * 12 + 4 + 6), (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 6),
    ]  # fmt: skip
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    depths = struct.pack("<HHH", 16, 16, 16)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + b"\0\0\0\0" + depths + bytes(6)


def png16(channels):
    """A PNG of 4x4 pixels with 16 bits a channel, written by hand: Pillow writes none of colours."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 4, 4, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = (b"\0" + bytes(2 * channels * 4)) * 4
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "make",
    [
        lambda: encoded(np.full((4, 4), 40_000, dtype=np.uint16)),
        lambda: encoded(np.full((4, 4), 0.5, dtype=np.float32), "TIFF"),
        lambda: ppm(65_535),
        lambda: ppm(1023),
        deep_tiff,
        lambda: png16(3),
    ],
    ids=["grey png", "float tiff", "ppm", "ppm of 10 bits", "colour tiff", "colour png"],
)
def test_more_than_8_bits_are_refused_even_where_pillow_says_nothing(make):
    with pytest.raises(DataError, match="^k has more than 8 bits a channel"):
        read_picture(make(), name="k")


def test_ppm_of_8_bits_or_fewer_is_read():
    assert read_picture(ppm(255)).pixels.flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert read_picture(ppm(15)).pixels.max() == 85


@pytest.mark.parametrize(("brand", "kind"), [(b"heic", "HEIC"), (b"mif1", "HEIC"), (b"avif", "AVIF")])
def test_photos_of_phones_are_named_with_a_way_out_and_not_passed_over(brand, kind, tmp_path):
    data = b"\0\0\0\x18ftyp" + brand + bytes(40)
    plant(tmp_path / "src", {"a/0.png": 0, f"a/1.{kind.lower()}": data})
    for attempt in (lambda: read_picture(data, name="k"), lambda: Preparation()(data, name="k")):
        with pytest.raises(DataError, match=f"(?s)^k is a {kind} file.*Export it as PNG"):
            attempt()
    with pytest.raises(DataError, match=f"sample a/1 is a {kind} file"):
        import_data(tmp_path / "src", tmp_path / "out")


def test_missing_files_and_folders_are_refused_in_words(tmp_path):
    for path in (tmp_path, tmp_path / "no.png"):
        with pytest.raises(DataError, match="cannot be read"):
            read_picture(path)


def test_alpha_and_the_colours_under_it_are_kept():
    rgba = np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8)
    picture = read_picture(encoded(rgba))
    assert np.array_equal(np.array(picture.alpha), rgba[..., 3]) and np.array_equal(
        np.array(picture.rgb), rgba[..., :3]
    )
    palette = Image.fromarray(rgba[..., :3]).quantize(4)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=bytes([0, 128]))
    picture = read_picture(file.getvalue())
    assert np.array_equal(np.array(picture.rgb), np.array(palette.convert("RGB")))
    assert set(np.unique(np.array(picture.alpha))) <= {0, 128, 255} and np.array(picture.alpha).min() < 255


def test_an_animation_gives_its_first_frame_and_says_how_many_there_are():
    frames = [Image.fromarray(np.full((8, 8, 3), v, dtype=np.uint8)) for v in (10, 200, 30)]
    for kind in ("GIF", "WEBP", "TIFF"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        picture = read_picture(file.getvalue())
        assert picture.frames == 3 and abs(int(picture.pixels[0, 4, 4]) - 10) < 4, kind


def test_a_walk_is_sorted_and_leaves_hidden_files_and_folders_out_at_every_depth(tmp_path):
    names = ["b/2.PNG", "a.jpg", "b/1.webp", "b/c/d.tif", "notes.txt"]
    hidden = [".a.png", ".git/x.png", "b/.cache/y.png", "b/c/.z.png", "b/.cache/deep/z.png"]
    plant(tmp_path, dict.fromkeys([*names, *hidden], b"x"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone")

    def within(paths):
        return [p.relative_to(tmp_path).as_posix() for p in paths]

    assert within(walk_files(tmp_path)) == ["a.jpg", "b/1.webp", "b/2.PNG", "b/c/d.tif", "notes.txt"]
    assert within(find_pictures(tmp_path)) == ["a.jpg", "b/1.webp", "b/2.PNG", "b/c/d.tif"]
    assert within(find_pictures(tmp_path, nested=False)) == ["a.jpg"]
    assert within(find_pictures(tmp_path / "b", nested=False)) == ["b/1.webp", "b/2.PNG"]


def test_hidden_folders_are_no_part_of_an_import(tmp_path):
    plant(tmp_path / "src", {"a/0.png": 0, "a/.thumbs/0.png": 1, "a/x/1.png": 2})
    import_data(tmp_path / "src", tmp_path / "out")
    assert sorted(ShardSet.open(tmp_path / "out").keys) == ["a/0", "a/x/1"]


def test_endings_are_those_of_the_formats_and_of_photos_that_are_refused_by_name():
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".heic"} <= ENDINGS
    assert is_picture("a/B.JFIF") and not is_picture("a.svg") and not is_picture("png")


def test_nobody_else_opens_picture_files():
    """The benchmarks read buffers that they wrote themselves, and a poison the pictures that it is made of."""
    package, users = Path(poisonshield.__file__).parent, {}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                users[path.relative_to(package).as_posix()] = {keyword.arg for keyword in node.keywords}
    places = ("data/pictures.py", "bench/jpeg.py", "bench/stream.py", "poisons/given.py")
    assert users == dict.fromkeys(places, {"formats"})


def test_a_jpeg_with_further_pictures_behind_it_is_a_jpeg():
    frames = [Image.fromarray(array_of(seed, (16, 8))) for seed in range(2)]
    file = io.BytesIO()
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    picture, stored = read_picture(file.getvalue()), Preparation()(file.getvalue(), name="k")
    assert (picture.format, picture.frames, picture.pixels.shape) == ("MPO", 2, (3, 16, 8))
    assert (stored.data, stored.extension) == (file.getvalue(), "jpg")


def claiming(width, height):
    """A sound little PNG whose header says another size, with a checksum that fits."""
    file = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_a_png_that_cannot_hold_what_it_claims_is_not_decoded():
    """faults C: 100 bytes that claim 11,000 x 11,000 pixels took 2.3 GB before they were found to end early."""
    with pytest.raises(DataError, match="so few cannot hold 11000x11000 pixels"):
        read_picture(claiming(11_000, 11_000))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("side", [1, 3, 2500])
def test_a_png_that_is_as_small_as_can_be_is_decoded(mode, side):
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, "PNG", compress_level=9)
    assert read_picture(file.getvalue()).pixels.shape == (3, side, side)
