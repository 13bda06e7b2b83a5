"""Concepts from files: crops act alike on picture and mask, and bad files are named."""

import logging

import numpy as np
import pytest
import torch
from made import array, disc, equal_concepts, save
from PIL import Image

from poisonshield.data.concepts.reader import load_concepts
from poisonshield.errors import ConfigError, DataError


def test_folders_of_pictures_become_concepts_with_masks_captions_and_keys(concept_folders):
    cup, hat = load_concepts(concept_folders, size=16, masks="file")
    assert (cup.name, hat.name, cup.group) == ("cup", "hat", None)
    assert hat.images[1].caption == "a red hat 1"
    for image in (*cup.images, *hat.images):
        assert image.pixels.shape == (3, 16, 16) and image.pixels.dtype == torch.uint8
        assert image.mask.shape == (1, 16, 16) and image.mask.dtype == torch.float32
        assert set(image.mask.unique().tolist()) == {0.0, 1.0}
    assert cup.images[0].key.startswith("cup/0@") and len(cup.images[0].key) == len("cup/0@") + 8
    assert hat.images[0].stem == "a_red hat 0"
    assert all(image.mask is None for image in load_concepts(concept_folders, size=16)[0].images)


def test_names_choose_and_order_and_a_folder_of_pictures_is_one_concept(concept_folders):
    assert [c.name for c in load_concepts(concept_folders, size=8, names=["hat", "cup"])] == ["hat", "cup"]
    (cup,) = load_concepts(concept_folders / "cup", size=16, masks="file")
    equal_concepts([cup], load_concepts(concept_folders, size=16, names=["cup"], masks="file"))
    with pytest.raises(DataError, match="no concept 'cap'. Did you mean cup"):
        load_concepts(concept_folders, size=8, names=["cap"])


@pytest.mark.parametrize("crop", ["center", "squash"])
@pytest.mark.parametrize("height, width", [(24, 36), (36, 24), (25, 40), (20, 20)])
def test_crop_and_resize_act_on_picture_and_mask_alike(tmp_path, crop, height, width):
    """A picture that shows its own mask: black outside, white within. After any crop they must still agree."""
    y, x = np.mgrid[:height, :width]
    inside = (y >= 8) & (y < 15) & (x >= 9) & (x < 22)
    save(tmp_path / "c" / "p.png", np.repeat(inside[..., None], 3, 2).astype(np.uint8) * 255)
    save(tmp_path / "c" / "p.mask.png", inside.astype(np.uint8) * 255)
    (image,) = load_concepts(tmp_path / "c", size=20, crop=crop, masks="file")[0].images
    shown, mask = image.pixels[:1].float() / 255, image.mask
    sure = (shown < 0.2) | (shown > 0.8)  # antialiased edges are neither
    assert sure.float().mean() > 0.8
    assert ((shown > 0.5) == (mask > 0.5))[sure].all()


def test_crop_and_resize_equal_another_library(tmp_path):
    """torchvision's antialiased bicubic, within its rounding of one level; nearest exactly, at pixel centres."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    smooth = np.array(Image.fromarray(array(5, 8)).resize((80, 50), Image.Resampling.BICUBIC))
    mask = np.random.default_rng(3).integers(0, 256, (50, 80), dtype=np.uint8)
    save(tmp_path / "c" / "p.png", smooth)
    save(tmp_path / "c" / "p.mask.png", mask)
    for crop, columns in (("center", slice(15, 65)), ("squash", slice(0, 80))):
        (image,) = load_concepts(tmp_path / "c", size=32, crop=crop, masks="file")[0].images
        cut = torch.from_numpy(smooth[:, columns]).permute(2, 0, 1)
        wanted = F.resize(cut, [32, 32], InterpolationMode.BICUBIC, antialias=True)
        assert (image.pixels.int() - wanted.int()).abs().max() <= 1
        masked = torch.from_numpy(mask[:, columns])[None]
        assert torch.equal(image.mask * 255, F.resize(masked, [32, 32], InterpolationMode.NEAREST_EXACT).float())


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    pixels = array(20, 30)
    save(tmp_path / "c" / "p.png", pixels, exif=exif)
    save(tmp_path / "c" / "p.mask.png", disc(30, 20))  # of the size that is shown
    (image,) = load_concepts(tmp_path / "c", size=20, masks="file")[0].images
    turned = np.rot90(pixels, -1)[5:25]
    assert np.array_equal(image.pixels.permute(1, 2, 0).numpy(), turned)


def test_grey_binary_and_one_bit_masks_mean_the_same_scale(tmp_path):
    grey = disc(value=255) // 2
    for name, pixels in {"grey": grey, "ones": disc(value=1), "full": disc()}.items():
        save(tmp_path / "c" / f"{name}.png", array())
        save(tmp_path / "c" / f"{name}.mask.png", pixels)
    save(tmp_path / "c" / "bit.png", array())
    Image.fromarray(disc()).convert("1").save(tmp_path / "c" / "bit.mask.png")
    masks = {i.stem: i.mask for i in load_concepts(tmp_path / "c", size=20, masks="file")[0].images}
    assert masks["grey"].max() == torch.tensor(127.0) / 255
    assert torch.equal(masks["ones"], masks["full"]) and torch.equal(masks["bit"], masks["full"])


def test_alpha_is_a_mask_and_colours_stay_beneath_it(tmp_path):
    rgba = np.dstack([array(20, 20), disc(20, 20, 200)])
    save(tmp_path / "c" / "p.png", rgba)
    (image,) = load_concepts(tmp_path / "c", size=20, masks="alpha")[0].images
    assert np.array_equal(image.pixels.permute(1, 2, 0).numpy(), rgba[..., :3])
    assert np.array_equal((image.mask[0] * 255).round().numpy(), rgba[..., 3])
    save(tmp_path / "c" / "q.png", array())
    with pytest.raises(DataError, match="q.png has no alpha channel.*masks: file or null"):
        load_concepts(tmp_path / "c", size=20, masks="alpha")


def test_small_pictures_are_enlarged_with_a_warning(tmp_path, caplog):
    save(tmp_path / "c" / "p.png", array(12, 30))
    with caplog.at_level(logging.WARNING):
        (concept,) = load_concepts(tmp_path / "c", size=16)
    assert concept.images[0].pixels.shape == (3, 16, 16)
    assert "c: 1 pictures are smaller than 16 (down to 12)" in caplog.text


def test_a_missing_mask_is_named_with_its_place(concept_folders):
    (concept_folders / "hat" / "masks" / "a_red hat 1.png").unlink()
    told = r"(?s)a_red hat 1.png has no mask, as 1 of the 2 .*\.mask\.png .*poisonshield masks"
    with pytest.raises(DataError, match=told):
        load_concepts(concept_folders, size=16, masks="file")
    load_concepts(concept_folders, size=16)


def test_masks_of_another_size_empty_coloured_or_deep_are_refused_by_name(concept_folders):
    file = concept_folders / "cup" / "0.mask.png"

    def refused(told, pixels, mode=None):
        Image.fromarray(pixels, mode).save(file) if mode else Image.fromarray(pixels).save(file)
        with pytest.raises(DataError, match=f"(?s)0.mask.png.*{told}"):
            load_concepts(concept_folders, size=16, masks="file")

    refused("20x30 pixels and its picture 30x20", disc(30, 20))
    refused("is empty", disc() * 0)
    refused("coloured", array())
    refused("transparent", np.dstack([disc()] * 4))
    refused("more than 8 bits", disc().astype(np.uint16) * 257)
    file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="0.mask.png: 10 bytes are not a whole"):
        load_concepts(concept_folders, size=16, masks="file")
    edge = disc() * 0
    edge[:, :3] = 255  # beyond the centred square
    save(file, edge)
    with pytest.raises(DataError, match="(?s)cup/0.png, within the center 16x16 crop, is empty"):
        load_concepts(concept_folders, size=16, masks="file")
    load_concepts(concept_folders, size=16, masks="file", crop="squash")


def test_unreadable_pictures_are_named_with_a_way_out(concept_folders):
    file = concept_folders / "cup" / "1.png"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"(?s)cup/1.png: \d+ bytes are not a whole .*image.*Restore the file"):
        load_concepts(concept_folders, size=16)
    Image.fromarray(disc().astype(np.uint16) * 257).save(file)
    with pytest.raises(DataError, match="1.png has more than 8 bits"):
        load_concepts(concept_folders, size=16)


def test_unclear_layouts_are_refused(tmp_path, concept_folders):
    with pytest.raises(DataError, match="does not exist"):
        load_concepts(tmp_path / "nowhere", size=16)
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no picture"):
        load_concepts(tmp_path / "empty", size=16)
    save(concept_folders / "stray.png", array())
    with pytest.raises(DataError, match="stray.png lies beside .*one concept or several"):
        load_concepts(concept_folders, size=16)
    with pytest.raises(ConfigError, match="center or squash"):
        load_concepts(concept_folders, size=16, crop="middle")
