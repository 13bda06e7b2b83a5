"""`poisonshield masks`: files that training reads, a sheet, empty masks by name, and what is refused."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_folder
from typer.testing import CliRunner

from poisonshield.api.masks import CONCEPTS, describe, dim_outside, masks
from poisonshield.batch import Batch
from poisonshield.cli import app
from poisonshield.data.concepts.reader import load_concepts
from poisonshield.defenses.diffusion.masks.attention import Attention
from poisonshield.errors import BusyError, ConfigError, DataError, StorageError
from poisonshield.files import LOCK
from poisonshield.models.diffusion.pipeline import LatentDiffusion

QUICK = {"purifier": None, "size": 32}


def disc(path, size=(96, 64), *, radius=18, seed=0, **how):
    """A red disc on a grey-blue ground with a little noise, (width, height)."""
    y, x = np.mgrid[: size[1], : size[0]]
    inside = (x - size[0] / 2) ** 2 + (y - size[1] / 2) ** 2 < radius**2
    pixels = np.where(inside[..., None], (230, 50, 25), (80, 128, 150))
    pixels = pixels + np.random.default_rng(seed).integers(-8, 9, pixels.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, **how)
    return inside


@pytest.fixture
def photos(tmp_path):
    """Two concepts of two photos; one lies on its side and is turned by EXIF, one has a caption and an old mask."""
    root, exif = tmp_path / "photos", Image.Exif()
    exif[0x0112] = 6
    disc(root / "ball" / "a.jpg", quality=95, exif=exif)
    disc(root / "ball" / "b.png")
    disc(root / "plate" / "a.png", (64, 64), radius=20)
    disc(root / "plate" / "b.webp", (64, 64), radius=20, quality=95)
    (root / "ball" / "b.json").write_text('{"caption": "a red ball"}')
    Image.new("L", (96, 64), 255).save(root / "ball" / "b.mask.png")
    return root


def test_masks_are_found_and_training_reads_them(photos, tmp_path):
    pytest.importorskip("cv2")
    found = masks(photos, tmp_path / "out", mask="grabcut", side=0.75, purifier=None, size=96)
    read = load_concepts(tmp_path / "out" / CONCEPTS, size=64, masks="file")
    assert [c.name for c in read] == ["ball", "plate"] and [len(c.images) for c in read] == [2, 2]
    assert read[0].images[1].caption == "a red ball"
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    for concept, radius in zip(read, (18, 20), strict=True):
        truth = ((x - 32) ** 2 + (y - 32) ** 2 < radius**2).float()
        for image in concept.images:
            iou = torch.minimum(image.mask[0], truth).sum() / torch.maximum(image.mask[0], truth).sum()
            print(f"{image.key}: IoU {iou:.3f}")
            assert iou > 0.9
    assert found.empty == [] and list(found.areas) == ["ball/a", "ball/b", "plate/a", "plate/b"]
    assert found.areas["plate/a"] == pytest.approx(np.pi * 20**2 / 64**2, rel=0.1)
    with Image.open(found.sheet) as sheet:
        assert min(sheet.size) > 200
    assert Image.open(tmp_path / "out" / CONCEPTS / "ball" / "a.mask.png").size == (64, 96)  # turned, as its photo


def test_one_concept_is_a_folder_of_photos(photos, tmp_path):
    found = masks(photos / "plate", tmp_path / "out", mask="box", side=0.5, **QUICK)
    (concept,) = load_concepts(tmp_path / "out" / CONCEPTS, size=64, masks="file")
    wanted = torch.zeros(1, 64, 64)
    wanted[:, 16:48, 16:48] = 1
    assert concept.name == "plate" and all(torch.equal(i.mask, wanted) for i in concept.images)
    assert found.areas == {"plate/a": 0.25, "plate/b": 0.25}


def test_masks_that_were_made_are_kept_unless_asked(photos, tmp_path):
    ask = lambda **how: masks(photos, tmp_path / "out", mask="box", **QUICK, **how)
    ask(side=0.5)
    corrected = tmp_path / "out" / CONCEPTS / "plate" / "a.mask.png"
    Image.new("L", (64, 64), 255).save(corrected)
    with pytest.raises(DataError, match="may have been corrected"):
        ask(side=0.5)
    assert np.array(Image.open(corrected)).min() == 255
    ask(side=0.5, overwrite=True)
    assert np.array(Image.open(corrected)).min() == 0


def test_empty_masks_are_named_and_not_written(photos, tmp_path, monkeypatch):
    from poisonshield.defenses.diffusion.masks.box import Box

    full = Box.__call__
    monkeypatch.setattr(Box, "__call__", lambda self, b, *rest: full(self, b) * (b.keys[0] != "plate/a"))
    result = CliRunner().invoke(app, ["masks", str(photos), "--mask", "box", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1 and "plate/a: the mask is EMPTY" in result.output
    folder = tmp_path / "out" / CONCEPTS / "plate"
    assert sorted(p.name for p in folder.iterdir()) == ["a.png", "b.mask.png", "b.webp"]
    with pytest.raises(DataError, match="has no mask"):
        load_concepts(tmp_path / "out" / CONCEPTS, size=64, masks="file")


def test_attention_asks_the_model_for_each_concepts_word(photos, tmp_path):
    folder = tiny_folder(tmp_path / "pipeline")
    found = masks(photos, tmp_path / "out", mask="attention", model=folder, words=["circle", "plate=star"], **QUICK)
    model = LatentDiffusion.load(folder)
    model.add_placeholder("<concept>")
    with Image.open(photos / "plate" / "a.png") as image:
        small = image.resize((32, 32), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
    mask = Attention()(Batch(("plate/a",), x), model, ["star"])
    assert found.areas["plate/a"] == pytest.approx(float(mask.mean()), abs=0.03)
    assert len(found.areas) + len(found.empty) == 4


def test_ssm_needs_no_placeholder_of_the_users(photos, tmp_path):
    (photos / "plate" / "b.webp").unlink()
    found = masks(
        photos / "plate", tmp_path / "out", mask="ssm", model=tiny_folder(tmp_path / "p", size=16), words=["star"],
        purifier="jpeg:50", size=16,
    )  # fmt: skip
    assert [*found.areas, *found.empty] == ["plate/a"]


def test_what_cannot_be_is_refused(photos, tmp_path):
    ask = lambda mask="attention", root=photos, **how: masks(root, tmp_path / "out", mask=mask, **how)
    for how, said in (
        ({}, "give --model"),
        ({"model": "tiny"}, "ball has none"),
        ({"model": "tiny", "words": ["plate=star"]}, "ball has none"),
        ({"model": "tiny", "words": ["plat=star"]}, "no concept 'plat'"),
        ({"model": "tiny", "words": ["star", "ring"]}, "CONCEPT=WORD"),
        ({"mask": "box", "words": ["star"]}, "pixels alone"),
        ({"mask": "grabcot"}, "Did you mean grabcut"),
        ({"mask": "box", "purifier": "jpg"}, "Did you mean jpeg"),
    ):
        with pytest.raises(ConfigError, match=said):
            ask(**how)
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        ask("box", tmp_path / "bare")
    disc(photos / "plate" / "a.jpg")
    with pytest.raises(DataError, match="have one name"):
        ask("box")


def test_the_sheet_dims_the_outside_and_draws_the_edge():
    pixels, mask = torch.full((3, 20, 30), 200, dtype=torch.uint8), torch.zeros(20, 30, dtype=torch.bool)
    mask[5:15, 10:20] = True
    x = dim_outside(pixels, mask)
    assert x.shape == (3, 20, 30) and x[0, 10, 15] == 200 / 255 and x[0, 0, 0] == pytest.approx(0.3 * 200 / 255)
    assert x[:, 4, 15].tolist() == [1, 0, 1]


def test_odd_areas_are_said(tmp_path):
    from poisonshield.api.masks import Masks

    lines = list(describe(Masks(tmp_path / "masks.png", {"a/1": 0.3, "a/2": 0.01}, ["a/3"])))
    assert "2 masks, of 1 to 30 %" in lines[0] and lines[1].startswith("a/2: the mask covers 1.0 %")
    assert lines[2].startswith("a/3: the mask is EMPTY")


@pytest.mark.parametrize("text", ["box:0.5", "box:side=0.5"])
def test_settings_of_a_mask_are_given_with_its_name(photos, tmp_path, text):
    result = CliRunner().invoke(
        app, ["masks", str(photos / "plate"), "--mask", text, "--size", "32", "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 0 and "of 25 to 25 % of the picture" in result.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bax", "Did you mean box"),
        ("box:sides=1", "Did you mean side"),
        ("box:2", "less than or equal to 1"),
        ("box:1,2", "'box:1,2' is not a mask. Write NAME"),
    ],
)
def test_a_text_that_names_no_mask_is_refused_in_words(photos, tmp_path, text, said):
    with pytest.raises(ConfigError, match=said):
        masks(photos, tmp_path / "out", mask=text, **QUICK)


def test_what_is_read_and_left_out_is_told(photos, tmp_path):
    """Rows "00-masklabel.png beside 00.png" and "`IMG.txt` captions", for `poisonshield masks`."""
    Image.new("L", (64, 64), 255).save(photos / "plate" / "a-masklabel.png")
    (photos / "plate" / "a.txt").write_text("a white plate")
    (photos / "plate" / "film.mp4").write_bytes(b"x")
    asked = ["masks", str(photos), "--mask", "box", "--size", "32", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0 and "read 2 concepts, 4 photos" in result.output
    assert "2 mask files, in whose place others are made" in result.output and "plate/film.mp4" in result.output
    folder = tmp_path / "out" / CONCEPTS / "plate"
    assert sorted(p.name for p in folder.iterdir()) == ["a.mask.png", "a.png", "a.txt", "b.mask.png", "b.webp"]
    read = load_concepts(tmp_path / "out" / CONCEPTS, size=64, masks="file")
    assert read[1].images[0].caption == "a white plate"


@pytest.mark.parametrize("place", [".", "out", "link"])
def test_masks_are_not_written_among_the_photos(photos, tmp_path, place):
    """Row "`protect toy -o toy`", for `masks`: also through a link, and into a folder below."""
    (tmp_path / "link").symlink_to(photos)
    out = tmp_path / "link" if place == "link" else photos / place
    with pytest.raises(ConfigError, match="folder of the originals"):
        masks(photos, out, mask="box", **QUICK)
    assert not (photos / "out").exists() and not (photos / CONCEPTS).exists()


def test_an_unreadable_photo_is_told_before_anything_is_written(photos, tmp_path):
    (photos / "plate" / "b.webp").write_bytes(b"RIFF")
    with pytest.raises(DataError, match="b.webp: 4 bytes are not a whole"):
        masks(photos, tmp_path / "out", mask="box", **QUICK)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_in_words_and_leaves_no_draft(photos, tmp_path, monkeypatch):
    """Row "full or read-only disk", for `masks`."""
    full = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="cannot be written: the disk is full"):
        masks(photos, tmp_path / "out", mask="box", **QUICK)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_two_commands_do_not_write_into_one_folder(photos, tmp_path):
    """Row "two runs in one folder", for `masks`: a fresh lock from another host."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "5", "boot": "b"}))
    with pytest.raises(BusyError, match="process 1 on elsewhere writes this set of masks"):
        masks(photos, tmp_path / "out", mask="box", **QUICK)
