"""One image on its way in: told apart by content, refused when broken, resized as Pillow resizes."""

import io
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import array_of, encoded, picture, pixels_of
from PIL import Image

from poisonshield.data.decode import decode, encode_jpeg, encode_png
from poisonshield.data.images import Preparation, resize_and_crop
from poisonshield.errors import ConfigError, DataError

KEEP = Preparation()


def smooth(size=(40, 60)):
    """uint8 [H, W, 3] without fine detail, as photographs are."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    waves = [np.sin(x / 9) * np.cos(y / 7), np.cos(x / 5 + y / 11), np.sin(y / 6 - x / 13)]
    return (127 + 120 * np.stack(waves, axis=2)).astype(np.uint8)


@pytest.mark.parametrize(("kind", "extension"), [("PNG", "png"), ("JPEG", "jpg")])
def test_jpeg_and_png_keep_their_bytes(kind, extension):
    data = picture(kind=kind)
    stored = KEEP(data, name="x")
    assert (stored.data, stored.extension, stored.size) == (data, extension, (6, 5))


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM"])
def test_other_lossless_formats_become_png_with_the_same_pixels(kind):
    stored = KEEP(picture(kind=kind), name="x")
    assert stored.extension == "png" and np.array_equal(pixels_of(stored.data), array_of()) and stored.size == (6, 5)


@pytest.mark.parametrize("kind", ["WEBP", "GIF"])
def test_other_lossy_formats_become_png_as_pillow_decodes_them(kind):
    data = encoded(smooth(), kind)
    stored = KEEP(data, name="x")
    assert stored.extension == "png" and np.array_equal(pixels_of(stored.data), pixels_of(data))


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.fromarray(np.full((8, 8, 3), v, dtype=np.uint8)) for v in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert (pixels_of(KEEP(file.getvalue(), name="x").data) == 10).all()


@pytest.mark.filterwarnings("ignore")  # Pillow comments on what it finds
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_image_that_was_cut_is_refused_whatever_its_format(kind):
    whole = encoded(smooth((24, 24)), kind)
    for length in [0, 1, 2, 3, 8, 20, 60, *range(100, len(whole) * 2 // 3, max(1, len(whole) // 25))]:
        with pytest.raises(DataError, match=f"^sample k: {length} bytes are not a whole .*image"):
            KEEP(whole[:length], name="sample k")


@pytest.mark.parametrize("position", [8, 18, 24, 36, 44, 60, 900, -9, -20], ids=str)
def test_png_with_one_damaged_byte_is_refused(position):
    """Some decoders end the process on such a file, others show noise."""
    whole = bytearray(picture(size=(24, 24)))
    whole[position] ^= 0x55
    with pytest.raises(DataError, match=f"^sample k: {len(whole)} bytes are not a whole PNG image"):
        decode(bytes(whole), "png", name="sample k")


def test_png_with_right_checksums_over_nonsense_is_refused():
    whole = picture(size=(24, 24))
    at = whole.index(b"IDAT")
    length = int.from_bytes(whole[at - 4 : at], "big")
    chunk = b"IDAT" + b"\x78\x9c" + b"\xff" * (length - 2)
    crafted = whole[:at] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + whole[at + 8 + length :]
    assert len(crafted) == len(whole)
    with pytest.raises(DataError, match="are not a whole PNG image"):
        decode(crafted, "png", name="sample k")


CLEAR = {"P": bytes([0, 128]), "L": 7, "RGB": (1, 2, 3)}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.filterwarnings("error")
def test_every_8_bit_kind_of_png_has_the_colours_that_pillow_drew(mode, transparent):
    image = Image.fromarray(smooth((9, 7))).convert(mode)
    expected = np.array(image.convert("RGB"))
    file = io.BytesIO()
    image.save(file, "PNG", **({"transparency": CLEAR[mode]} if transparent and mode in CLEAR else {}))
    assert np.array_equal(decode(file.getvalue(), "png", name="x").permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_every_kind_of_jpeg_has_the_colours_that_pillow_shows(mode):
    data = io.BytesIO()
    Image.fromarray(smooth()).convert(mode).save(data, "JPEG", quality=95)
    ours = decode(data.getvalue(), "jpg", name="x").permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - pixels_of(data.getvalue())).max() <= 3


@pytest.mark.parametrize("shape", [(3, 0, 4), (3, 4, 0), (3, 1, 65_501), (3, 65_501, 1)])
def test_sides_that_a_format_does_not_have_are_refused(shape):
    words = f"^sample k is {shape[1]}x{shape[2]} pixels, sides of 1 to 65,500 were wanted"
    for store in (encode_png, lambda image, name: encode_jpeg(image, quality=90, name=name)):
        with pytest.raises(DataError, match=words):
            store(torch.zeros(shape, dtype=torch.uint8), name="sample k")


@pytest.mark.filterwarnings("ignore")
@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF"]),
)
@settings(max_examples=150, deadline=None)
def test_bytes_that_are_no_image_raise_nothing_but_our_error(tail, head):
    with pytest.raises(DataError, match="^sample k"):
        KEEP(head + tail, name="sample k")


DEEP = np.arange(30, dtype=np.uint16).reshape(6, 5) * 2000


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_more_than_8_bits_a_channel_are_refused_and_not_cut_off(kind):
    with pytest.raises(DataError, match="^sample k has more than 8 bits a channel"):
        KEEP(encoded(DEEP, kind), name="sample k")


def test_float_pixels_are_refused():
    with pytest.raises(DataError, match="^sample k has more than 8 bits a channel .mode F."):
        KEEP(encoded(np.linspace(0, 1, 30, dtype=np.float32).reshape(6, 5), "TIFF"), name="sample k")


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (33, 33), (17, 90), (20, 12)])
@pytest.mark.parametrize("size", [16, 24])
def test_resized_image_is_what_pillow_makes_of_it(height, width, size):
    array = smooth((height, width))
    ours = resize_and_crop(torch.from_numpy(array).permute(2, 0, 1), size)
    assert ours.dtype == torch.uint8 and ours.shape == (3, size, size)
    h, w = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    theirs = np.array(Image.fromarray(array).resize((w, h), Image.Resampling.BILINEAR)).astype(int)
    top, left = round((h - size) / 2), round((w - size) / 2)
    theirs = theirs[top : top + size, left : left + size]
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1


def test_resized_image_is_stored_as_png_or_as_jpeg_of_the_quality_asked_for():
    data = encoded(smooth())
    png, fine, coarse = (Preparation(24, q)(data, name="x") for q in (None, 95, 10))
    assert [s.extension for s in (png, fine, coarse)] == ["png", "jpg", "jpg"]
    assert [s.size for s in (png, fine, coarse)] == [(24, 24)] * 3
    assert len(coarse.data) < len(fine.data)
    expected = resize_and_crop(torch.from_numpy(smooth()).permute(2, 0, 1), 24).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels_of(png.data), expected)
    error = [np.abs(pixels_of(s.data).astype(int) - expected).mean() for s in (fine, coarse)]
    assert error[0] < 6 and error[0] < error[1]


def test_one_image_gives_the_same_file_twice():
    data = encoded(smooth(), "BMP")
    for preparation in (KEEP, Preparation(24), Preparation(24, 80)):
        assert preparation(data, name="x") == preparation(data, name="y")


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ((0, None), "size is 0, at least 1 pixel"),
        ((-4, None), "size is -4, at least 1 pixel"),
        ((None, 90), "jpeg_quality is 90: .* only together with size"),
        ((24, 0), "jpeg_quality is 0: 1 to 100 was wanted"),
        ((24, 101), "jpeg_quality is 101: 1 to 100 was wanted"),
    ],
)
def test_impossible_settings_are_refused(settings_, words):
    with pytest.raises(ConfigError, match=words):
        Preparation(*settings_)


def test_description_names_what_was_done():
    assert KEEP.describe().startswith("original files")
    assert "resized to 24" in Preparation(24).describe() and "stored as PNG" in Preparation(24).describe()
    assert "stored as JPEG of quality 80" in Preparation(24, 80).describe()


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_png_is_lossless_at_every_size(height, width, seed):
    image = torch.from_numpy(array_of(seed, (height, width))).permute(2, 0, 1)
    data = encode_png(image)
    assert np.array_equal(pixels_of(data), array_of(seed, (height, width)))
    assert decode(data, "png", name="x").equal(image)


def test_jpeg_is_one_that_pillow_reads():
    image = torch.from_numpy(smooth()).permute(2, 0, 1)
    data = encode_jpeg(image, quality=95)
    assert Image.open(io.BytesIO(data)).format == "JPEG"
    assert np.abs(pixels_of(data).astype(int) - smooth()).mean() < 3
