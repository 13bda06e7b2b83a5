"""The README's first line for own photos, on a folder as a phone leaves it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from poisonshield.cli import app
from poisonshield.data import open_dataset

ORIENTATION = 0x0112


def picture(seed, size=(96, 64), mode="RGB"):
    """A smooth picture, reddish above and bluish below."""
    y, x = np.mgrid[: size[1], : size[0]]
    shade = 40 * np.sin(x / 9 + seed) + 100
    pixels = np.stack([np.where(y < size[1] / 2, 220, 30), shade, np.where(y < size[1] / 2, 30, 220)], axis=2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


@pytest.fixture
def photos(tmp_path):
    """train and val of two classes: HEIC, EXIF turned, grey, CMYK, a cut one, a film, and what systems leave."""
    heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif: pip install '.[heic]'")
    root = tmp_path / "photos"
    for number, folder in enumerate(("train/cat", "train/dog", "val/cat", "val/dog")):
        (root / folder).mkdir(parents=True)
        picture(number).save(root / folder / "IMG_1.jpg", quality=92)
    cat, exif = root / "train" / "cat", Image.Exif()
    heif.from_pillow(picture(7)).save(cat / "IMG_2.HEIC", quality=90)
    exif[ORIENTATION] = 6
    picture(8).transpose(Image.Transpose.ROTATE_90).save(cat / "IMG_3.JPG", quality=95, exif=exif)
    picture(9, mode="L").save(cat / "IMG_4.jpg")
    picture(10, mode="CMYK").save(cat / "IMG_5.jpg", quality=95)
    whole = io.BytesIO()
    picture(11).save(whole, "JPEG")
    (cat / "IMG_6.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (cat / "IMG_7.MOV").write_bytes(b"film")
    (cat / ".DS_Store").write_bytes(b"x")
    (root / "train" / "dog" / "Thumbs.db").write_bytes(b"x")
    return root


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_the_cut_photo_is_named_before_anything_is_written(photos, tmp_path):
    asked = run("data", "import", photos, "--out", tmp_path / "out", "--size", 32)
    assert asked.exit_code == 1 and not (tmp_path / "out").exists()
    assert "IMG_6" in str(asked.exception) and "--skip-broken" in str(asked.exception)


def test_a_phones_folder_becomes_a_data_set_and_what_was_done_is_said(photos, tmp_path):
    asked = run("data", "import", photos, "--out", tmp_path / "out", "--size", 32, "--skip-broken")
    assert asked.exit_code == 0, asked.output
    told = " ".join(asked.output.split())
    for fact in ("IMG_6", "IMG_7.MOV", "val", "cat", "dog"):
        assert fact in told, (fact, told)
    train, test = (open_dataset(str(tmp_path / "out"), split) for split in ("train", "test"))
    assert train.classes == test.classes == ("cat", "dog")
    assert [key.rpartition("/")[2] for key in train.keys] == [*(f"IMG_{n}" for n in range(1, 6)), "IMG_1"]
    pixels = dict(zip(train.keys, train.read(torch.arange(len(train))).float(), strict=True))
    for name in ("IMG_1", "IMG_2", "IMG_3", "IMG_5"):  # red above, whatever the file's format and turn
        x = next(v for k, v in pixels.items() if k.endswith(f"cat/{name}"))
        assert x[0, :12].mean() > 150 > 100 > x[0, -12:].mean(), name
    grey = next(v for k, v in pixels.items() if k.endswith("IMG_4"))
    assert (grey[0] - grey[2]).abs().max() <= 1
