"""Concepts from folders, tars and the rendered world: crops act alike on picture and mask, and bad files are named."""

import io
import json
import logging
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from poisonshield.data import world
from poisonshield.data.concepts import Concept, ConceptImage, load_concepts, rendered_concepts, write_concepts
from poisonshield.errors import ConfigError, DataError


def array(height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def disc(height=20, width=30, value=255):
    y, x = np.mgrid[:height, :width]
    return (((y - height / 2) ** 2 + (x - width / 2) ** 2) < 36).astype(np.uint8) * value


@pytest.fixture
def folders(tmp_path):
    """Two concepts of two pictures, with masks beside one and in a folder for the other."""
    for i in range(2):
        save(tmp_path / "set" / "cup" / f"{i}.png", array(seed=i))
        save(tmp_path / "set" / "cup" / f"{i}.mask.png", disc())
        save(tmp_path / "set" / "hat" / f"a_red hat {i}.png", array(seed=10 + i))
        save(tmp_path / "set" / "hat" / "masks" / f"a_red hat {i}.png", disc())
    return tmp_path / "set"


def equal(a, b):
    assert [(c.name, c.group, c.digest) for c in a] == [(c.name, c.group, c.digest) for c in b]
    for one, other in zip(a, b, strict=True):
        for p, q in zip(one.images, other.images, strict=True):
            assert (p.key, p.caption) == (q.key, q.caption)
            assert torch.equal(p.pixels, q.pixels)
            assert (p.mask is None) == (q.mask is None) and (p.mask is None or torch.equal(p.mask, q.mask))


def test_folders_of_pictures_become_concepts_with_masks_captions_and_keys(folders):
    cup, hat = load_concepts(folders, size=16, masks="file")
    assert (cup.name, hat.name, cup.group) == ("cup", "hat", None)
    assert hat.images[1].caption == "a red hat 1"
    for image in (*cup.images, *hat.images):
        assert image.pixels.shape == (3, 16, 16) and image.pixels.dtype == torch.uint8
        assert image.mask.shape == (1, 16, 16) and image.mask.dtype == torch.float32
        assert set(image.mask.unique().tolist()) == {0.0, 1.0}
    assert cup.images[0].key.startswith("cup/0@") and len(cup.images[0].key) == len("cup/0@") + 8
    assert hat.images[0].stem == "a_red hat 0"
    assert all(image.mask is None for image in load_concepts(folders, size=16)[0].images)


def test_names_choose_and_order_and_a_folder_of_pictures_is_one_concept(folders):
    assert [c.name for c in load_concepts(folders, size=8, names=["hat", "cup"])] == ["hat", "cup"]
    (cup,) = load_concepts(folders / "cup", size=16, masks="file")
    equal([cup], load_concepts(folders, size=16, names=["cup"], masks="file"))
    with pytest.raises(DataError, match="no concept 'cap'. Did you mean cup"):
        load_concepts(folders, size=8, names=["cap"])


def test_the_key_and_the_digest_follow_the_pixels(folders):
    before = load_concepts(folders, size=16, masks="file")[0]
    save(folders / "cup" / "0.png", array(seed=99))
    after = load_concepts(folders, size=16, masks="file")[0]
    assert before.images[0].key != after.images[0].key and before.images[1].key == after.images[1].key
    assert before.digest != after.digest
    without = load_concepts(folders, size=16)[0]
    assert without.images[0].key == after.images[0].key and without.digest != after.digest


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


def test_novel_concepts_have_captions_from_file_names_and_groups_by_name(tmp_path):
    for name in ("CokeCan", "FishDoll", "Other"):
        caption = f"a photo of {name}. on a table"
        save(tmp_path / name / "512x512" / f"{caption}.png", array())
        save(tmp_path / name / "SAM_masks" / f"{caption}.png", disc())
    all_of_them = load_concepts(tmp_path, size=16, masks="file")
    assert {c.name: c.group for c in all_of_them} == {"CokeCan": "id", "FishDoll": "od", "Other": None}
    assert all_of_them[0].images[0].caption == "a photo of CokeCan. on a table"
    assert "#" not in all_of_them[0].images[0].key and all_of_them[0].images[0].stem == "a photo of CokeCan_ on a table"
    assert [c.name for c in load_concepts(tmp_path, size=16, group="id")] == ["CokeCan"]
    assert [c.name for c in load_concepts(tmp_path, size=16, group="od")] == ["FishDoll"]
    with pytest.raises(DataError, match="no concept of group 'id'.*Use group: all"):
        load_concepts(tmp_path, size=16, group="id", names=["Other"])
    save(tmp_path / "CokeCan" / "original" / "a photo of CokeCan. on a table.png", array(40, 60))
    with pytest.raises(DataError, match="(?s)have one name.*move the folder of other versions"):
        load_concepts(tmp_path, size=16)


@pytest.mark.parametrize("target", ["out", "out.tar"])
def test_what_is_written_reads_back_equal(tmp_path, folders, target):
    made = (*load_concepts(folders, size=16, masks="file"), *rendered_concepts(2, seed=3, size=16))
    about = {made[0].images[0].key: {"poison": "advdm", "eps_px": 8 / 255}}
    write_concepts(made, tmp_path / target, about=about)
    back = load_concepts(tmp_path / target, size=16, masks="file", names=[c.name for c in made])
    equal(made, back)
    with pytest.raises(DataError, match="exists already"):
        write_concepts(made, tmp_path / target)
    if target == "out":
        assert json.loads((tmp_path / "out/cup/0.json").read_text())["poison"] == "advdm"
    assert not list(tmp_path.glob("*.tmp"))


def test_equal_concepts_are_written_as_equal_bytes_that_webdataset_groups(tmp_path):
    import webdataset as wds

    made = rendered_concepts(2, seed=1, kinds=[("yellow", "ring")])
    write_concepts(made, tmp_path / "a.tar")
    write_concepts(made, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    samples = list(wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["yellow_ring/00", "yellow_ring/01"]
    assert json.loads(samples[0]["json"]) == {"concept": "yellow_ring", "group": "od", "caption": "a yellow ring"}
    pixels = np.array(Image.open(io.BytesIO(samples[1]["png"])))
    assert np.array_equal(pixels, made[0].images[1].pixels.permute(1, 2, 0).numpy())
    assert "mask.png" in samples[0]


def test_a_tar_of_others_without_json_goes_by_its_folders(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for name in ("cup/0.png", "cup/1.png", "hat/0.png"):
            file = io.BytesIO()
            Image.fromarray(array()).save(file, "PNG")
            info = tarfile.TarInfo(name)
            info.size = len(file.getvalue())
            tar.addfile(info, io.BytesIO(file.getvalue()))
    found = load_concepts(tmp_path, size=16)
    assert {c.name: len(c.images) for c in found} == {"cup": 2, "hat": 1}


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_tar_is_refused_by_name(tmp_path, damage):
    write_concepts(rendered_concepts(3, seed=1, kinds=[("yellow", "ring")]), tmp_path / "a.tar")
    data = bytearray((tmp_path / "a.tar").read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        with tarfile.open(tmp_path / "a.tar") as tar:
            at = tar.getmembers()[3].offset
        data[at : at + 200] = b"x" * 200
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match="a.tar cannot be read as a tar.*Copy it again"):
        load_concepts(tmp_path / "a.tar", size=16)


def test_rendered_concepts_have_exact_masks_and_do_not_depend_on_each_other():
    ring, star, cross = rendered_concepts(3, seed=5)
    assert [c.name for c in (ring, star, cross)] == ["yellow_ring", "purple_star", "green_cross"]
    assert ring.group == "od" and star.images[0].caption == "a purple star"
    equal([star], rendered_concepts(3, seed=5, kinds=[("purple", "star")]))
    equal([Concept.of(star.name, star.images[:2], "od")], rendered_concepts(2, seed=5, kinds=[("purple", "star")]))
    first = 1000 * (list(world.COLORS).index("purple") * len(world.SHAPES) + world.SHAPES.index("star"))
    picture = world.render(first + 1, seed=5, only=[("purple", "star")])
    assert (star.images[1].mask - picture.mask).abs().max() <= 0.501 / 255
    assert (star.images[1].pixels / 255 - picture.x).abs().max() <= 0.501 / 255
    assert not torch.equal(ring.images[0].mask, star.images[0].mask)
    assert rendered_concepts(1, seed=5, kinds=[("red", "ring")], masks=False)[0].images[0].mask is None


def test_small_pictures_are_enlarged_with_a_warning(tmp_path, caplog):
    save(tmp_path / "c" / "p.png", array(12, 30))
    with caplog.at_level(logging.WARNING):
        (concept,) = load_concepts(tmp_path / "c", size=16)
    assert concept.images[0].pixels.shape == (3, 16, 16)
    assert "c: 1 pictures are smaller than 16 (down to 12)" in caplog.text


def test_a_missing_mask_is_named_with_its_place(folders):
    (folders / "hat" / "masks" / "a_red hat 1.png").unlink()
    with pytest.raises(DataError, match=r"(?s)a_red hat 1.png has no mask, as 1 of the 2 .*\.mask\.png .*masks: null"):
        load_concepts(folders, size=16, masks="file")
    load_concepts(folders, size=16)


def test_masks_of_another_size_empty_coloured_or_deep_are_refused_by_name(folders):
    file = folders / "cup" / "0.mask.png"

    def refused(told, pixels, mode=None):
        Image.fromarray(pixels, mode).save(file) if mode else Image.fromarray(pixels).save(file)
        with pytest.raises(DataError, match=f"(?s)0.mask.png.*{told}"):
            load_concepts(folders, size=16, masks="file")

    refused("20x30 pixels and its picture 30x20", disc(30, 20))
    refused("is empty", disc() * 0)
    refused("coloured", array())
    refused("transparent", np.dstack([disc()] * 4))
    refused("more than 8 bits", disc().astype(np.uint16) * 257)
    file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="0.mask.png cannot be read"):
        load_concepts(folders, size=16, masks="file")
    edge = disc() * 0
    edge[:, :3] = 255  # beyond the centred square
    save(file, edge)
    with pytest.raises(DataError, match="(?s)cup/0.png, within the center 16x16 crop, is empty"):
        load_concepts(folders, size=16, masks="file")
    load_concepts(folders, size=16, masks="file", crop="squash")


def test_unreadable_pictures_are_named_with_a_way_out(folders):
    file = folders / "cup" / "1.png"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cup/1.png cannot be read as an image.*Restore it"):
        load_concepts(folders, size=16)
    Image.fromarray(disc().astype(np.uint16) * 257).save(file)
    with pytest.raises(DataError, match="1.png has more than 8 bits"):
        load_concepts(folders, size=16)


def test_unclear_layouts_are_refused(tmp_path, folders):
    with pytest.raises(DataError, match="does not exist"):
        load_concepts(tmp_path / "nowhere", size=16)
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no picture"):
        load_concepts(tmp_path / "empty", size=16)
    save(folders / "stray.png", array())
    with pytest.raises(DataError, match="stray.png lies beside .*one concept or several"):
        load_concepts(folders, size=16)
    with pytest.raises(ConfigError, match="center or squash"):
        load_concepts(folders, size=16, crop="middle")
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    for name in ("a#b", "a/b", "", ".a", "Mask"):
        with pytest.raises(DataError, match="cannot name a concept"):
            Concept.of(name, [ConceptImage.of("a", "0", pixels)])
    with pytest.raises(DataError, match="twice"):
        Concept.of("a", [ConceptImage.of("a", "0", pixels), ConceptImage.of("a", "0", pixels)])
    with pytest.raises(DataError, match="no key of these"):
        write_concepts([Concept.of("a", [ConceptImage.of("a", "0", pixels)])], tmp_path / "w", about={"b/0@": {}})


def test_json_beside_a_picture_gives_caption_and_group(folders):
    (folders / "cup" / "0.json").write_text(json.dumps({"caption": "a blue cup", "group": "od"}))
    cup = load_concepts(folders, size=16, names=["cup"], group="od")[0]
    assert (cup.group, cup.images[0].caption, cup.images[1].caption) == ("od", "a blue cup", "")
    (folders / "cup" / "0.json").write_text("[1]")
    with pytest.raises(DataError, match="0.json: a table with the texts"):
        load_concepts(folders, size=16)
