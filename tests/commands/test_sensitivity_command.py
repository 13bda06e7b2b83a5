"""Maps and profiles of picture files with a random pipeline and an embedding file, from folder to report."""

import errno
import json
import os

import numpy
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from poisonshield import world
from poisonshield.api.pictures import load_pictures
from poisonshield.api.profile import profile
from poisonshield.api.sensitivity import sensitivity
from poisonshield.errors import ConfigError, DataError, StorageError
from poisonshield.models.diffusion.embeddings import Learned, save_embedding
from poisonshield.models.diffusion.sensitivity import Sensitivity, semantic_sensitivity
from poisonshield.reports.maps import draw_totals, scale_maps
from poisonshield.world.small_pipeline import build_tokenizer, write_pipeline


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline at 16 pixels, two pictures clean, poisoned and with masks, and two embeddings of one word each."""
    root = tmp_path_factory.mktemp("made")
    model = tiny_model(size=16)
    tokenizer = build_tokenizer(world.WORDS, root / "pipeline" / "tokenizer", length=24)
    write_pipeline(
        root / "pipeline", vae=model.vae, unet=model.unet, text_encoder=model.text_encoder, tokenizer=tokenizer,
        scheduler=model.scheduler,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for folder in ("clean", "poisoned", "masks"):
        (root / folder).mkdir()
    for name in ("cat", "dog"):
        x = torch.randint(0, 256, (24, 20, 3), generator=generator)
        shift = torch.randint(-16, 17, x.shape, generator=generator)
        Image.fromarray(x.to(torch.uint8).numpy()).save(root / "clean" / f"{name}.png")
        Image.fromarray((x + shift).clamp(0, 255).to(torch.uint8).numpy()).save(root / "poisoned" / f"{name}.png")
        mask = torch.zeros(24, 20, dtype=torch.uint8)
        mask[6:18, 4:14] = 255
        Image.fromarray(mask.numpy()).save(root / "masks" / f"{name}.png")
    for name, word in (("learned", "ring"), ("other", "star")):
        save_embedding(Learned("<sks>", model.word_vector(word)[None]), root / f"{name}.safetensors")
    return root


FEW = {"timesteps": [100, 700], "probes": 4, "noises": 1}


def test_maps_of_clean_and_poisoned_pictures_become_files_and_numbers(made, tmp_path):
    given = sensitivity(
        made / "pipeline", made / "poisoned", made / "learned.safetensors", tmp_path, reference=made / "clean",
        masks=made / "masks", **FEW,
    )  # fmt: skip
    record = json.loads((tmp_path / "sensitivity.json").read_text())
    assert record == given
    assert [p["name"] for p in record["pictures"]] == ["cat", "dog"] and record["size"] == 16
    for picture in record["pictures"]:
        for which in ("reference", "images"):
            assert len(picture[which]["total"]) == len(picture[which]["concept_share"]) == 2
            assert min(picture[which]["total"]) > 0 and min(picture[which]["concept_share"]) > 0
        assert picture["images"]["total"] != picture["reference"]["total"]
    for name in ("cat.png", "dog.png", "totals.png"):
        with Image.open(tmp_path / name) as drawn:
            assert min(drawn.size) > 200
    # The numbers are those of the function, under the noise of the file's name.
    from poisonshield.models.diffusion.pipeline import LatentDiffusion

    model = LatentDiffusion.load(made / "pipeline")
    model.add_placeholder("<sks>")
    with Image.open(made / "clean" / "dog.png") as image:
        square = image.crop((0, 2, 20, 22)).resize((16, 16), Image.Resampling.BICUBIC)
    x = torch.from_numpy(numpy.array(square)).permute(2, 0, 1)[None] / 255
    wanted = semantic_sensitivity(
        model, x, rows=model.word_vector("ring")[None], prompt="a photo of a <sks>", keys=["dog"], **FEW
    ).total
    assert record["pictures"][1]["reference"]["total"] == pytest.approx(wanted[0].tolist(), rel=1e-4)


@pytest.mark.parametrize("norm", ["self", "sum1"])
def test_signed_and_delta_compare_with_another_embedding_or_a_word(made, tmp_path, norm):
    mode, against = ("signed", str(made / "other.safetensors")) if norm == "self" else ("delta", "star")
    record = sensitivity(
        made / "pipeline", [made / "clean" / "dog.png"], made / "learned.safetensors", tmp_path, mode=mode,
        against=against, norm=norm, **FEW,
    )  # fmt: skip
    assert [p["name"] for p in record["pictures"]] == ["dog"]
    assert "concept_share" not in record["pictures"][0]["images"]
    assert (tmp_path / "dog.png").is_file()


def test_a_profile_names_its_floor_and_draws_it(made, tmp_path, caplog):
    given = profile(
        made / "pipeline", made / "poisoned", made / "learned.safetensors", tmp_path, reference=made / "clean", bins=4,
        noises=3, masks=made / "masks",
    )  # fmt: skip
    record = json.loads((tmp_path / "profile.json").read_text())
    assert record == given
    assert record["edges"] == [0, 250, 500, 750, 1000] and 200 <= record["t_min"] <= 800
    for values in (record["x"]["length"], record["difference"]["mean"], record["distance"], record["cosine"]):
        assert len(values) == 4 and all(isinstance(v, float) for v in values)
    assert record["energy"] == pytest.approx([sum(band) for band in record["bands"]])
    assert record["energy"] == sorted(record["energy"], reverse=True)  # the poison is seen at low timesteps
    with Image.open(tmp_path / "profile.png") as drawn:
        assert min(drawn.size) > 200


def test_a_profile_without_clean_pictures_compares_with_a_jpeg_or_with_nothing(made, tmp_path):
    ask = lambda out, **more: profile(
        made / "pipeline", made / "poisoned", made / "learned.safetensors", tmp_path / out, bins=2, noises=2, **more
    )
    compressed, alone = ask("jpeg", reference="jpeg:25"), ask("alone")
    assert compressed["reference"] == "jpeg:25" and isinstance(compressed["t_min"], int)
    assert alone["t_min"] is None and "distance" not in alone and (tmp_path / "alone" / "profile.png").is_file()
    assert alone["x"] == compressed["x"]
    for wrong, said in (("jpeg:", "NAME:VALUE"), ("jpeg:0", "greater than or equal to 1"), ("jpeg:low", "integer")):
        with pytest.raises(ConfigError, match=said):
            ask("wrong", reference=wrong)


def test_pictures_and_masks_belong_together_by_name(made, tmp_path):
    found = load_pictures(made / "clean", size=16, masks=made / "masks")
    assert found.names == ("cat", "dog") and found.x.shape == (2, 3, 16, 16) and found.mask.shape == (2, 1, 16, 16)
    assert found.mask.unique().tolist() == [0, 1]
    # As the package writes sets: masks beside the pictures, which are then no pictures themselves.
    for name in ("cat", "dog"):
        (tmp_path / f"{name}.png").write_bytes((made / "clean" / f"{name}.png").read_bytes())
        (tmp_path / f"{name}.mask.png").write_bytes((made / "masks" / f"{name}.png").read_bytes())
    beside = load_pictures(tmp_path, size=16, masks=tmp_path)
    assert torch.equal(beside.x, found.x) and torch.equal(beside.mask, found.mask)
    assert load_pictures(tmp_path, size=16).mask is None
    (tmp_path / "dog.mask.png").unlink()
    with pytest.raises(DataError, match="no mask for dog.png"):
        load_pictures(tmp_path, size=16, masks=tmp_path)
    (tmp_path / "dog.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="dog.png: 10 bytes are not a whole"):
        load_pictures(tmp_path, size=16)
    with pytest.raises(DataError, match="is no picture file"):
        load_pictures(tmp_path / "nothing", size=16)
    with pytest.raises(DataError, match="holds no picture itself"):
        load_pictures(made, size=16)
    with pytest.raises(DataError, match="one name"):
        load_pictures([made / "clean" / "cat.png", made / "poisoned" / "cat.png"], size=16)


def test_what_does_not_fit_is_refused_before_anything_is_computed(made, tmp_path):
    ask = lambda **changes: sensitivity(
        made / "pipeline",
        changes.pop("images", made / "clean"),
        made / "learned.safetensors",
        tmp_path / "out",
        **FEW | changes,
    )
    for changes, words in (
        ({"prompt": "a photo"}, "has no {}"),
        ({"mode": "delta"}, "needs `against`"),
        ({"against": "star"}, "is for the modes delta and signed"),
        ({"norm": "max"}, "norm 'max' is unknown"),
    ):
        with pytest.raises(ConfigError, match=words):
            ask(**changes)
    with pytest.raises(DataError, match="reference lacks dog, as 1 of 2"):
        ask(reference=[made / "clean" / "cat.png"])
    assert not (tmp_path / "out").exists()


def test_joint_scales_are_shared_and_end_at_the_99th_percentile():
    maps = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    maps[1] *= 5
    _, low, high = scale_maps(maps, "joint")
    assert torch.equal(low[0], low[1]) and torch.equal(high[0], high[1])
    assert torch.allclose(high[0], torch.stack([maps[:, t].flatten().quantile(0.99) for t in range(3)]))
    assert torch.allclose(low[0], maps.amin((0, 2, 3)))
    _, low, high = scale_maps(maps, "self")
    assert torch.allclose(high, maps.flatten(2).quantile(0.99, dim=2)) and bool((high[1] > 3 * high[0]).all())
    shares, _, high = scale_maps(maps, "sum1")
    assert torch.allclose(shares.sum((2, 3)), torch.ones(2, 3)) and torch.equal(high[0], high[1])
    _, low, high = scale_maps(maps - 0.5, "joint", signed=True)
    assert torch.equal(low, -high)
    _, low, high = scale_maps(torch.zeros(1, 1, 4, 4), "joint")
    assert bool((high > low).all())


def test_totals_are_drawn_with_and_without_masks(tmp_path):
    maps = torch.rand(2, 2, 4, 4)
    for name, mask in (("plain", None), ("masked", torch.ones(2, 1, 4, 4))):
        assert draw_totals(tmp_path / f"{name}.png", {"images": Sensitivity(maps, (1, 2), "pred_jac", mask)}).is_file()


@pytest.mark.parametrize("read", [sensitivity, profile])
def test_results_are_not_written_over_the_pictures(made, read):
    """Row "`protect toy -o toy`": maps have the names of pictures, and would take their place."""
    before = (made / "clean" / "cat.png").read_bytes()
    for out in ("poisoned", "clean", "masks"):
        with pytest.raises(ConfigError, match="folder of the originals"):
            read(
                made / "pipeline", made / "poisoned", made / "learned.safetensors", made / out,
                reference=made / "clean", masks=made / "masks",
            )  # fmt: skip
    assert (made / "clean" / "cat.png").read_bytes() == before


@pytest.mark.parametrize("read, few", [(sensitivity, FEW), (profile, {"bins": 2, "noises": 2})])
def test_a_full_disk_is_told_in_words(made, tmp_path, monkeypatch, read, few):
    """Row "full or read-only disk", for `sensitivity` and `profile`."""
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StorageError, match="the disk is full"):
        read(made / "pipeline", made / "poisoned", made / "learned.safetensors", tmp_path / "out", **few)
    assert not list((tmp_path / "out").iterdir())
