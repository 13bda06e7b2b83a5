"""`poisonshield survival` on picture files: numbers that Pillow's JPEG and NumPy give again, texts, refusals."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from tiny import tiny_folder, tiny_model
from typer.testing import CliRunner

from poisonshield import world
from poisonshield.api.survival import STANDARD, WITH_MODEL, choose_purifiers, describe, survival
from poisonshield.cli import app
from poisonshield.defenses.purify.named import parse_purifier, purifier_block
from poisonshield.errors import ConfigError, DataError
from poisonshield.evals.diffusion.parts.survival import FORMAT, Report


def write(folder, pictures):
    folder.mkdir()
    for key, x in pictures.items():
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"{key}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two rendered pictures, clean, with a poison of advdm and with noise."""
    from poisonshield.poisons.diffusion.advdm import AdvDM

    root, draw = tmp_path_factory.mktemp("made"), torch.Generator().manual_seed(0)
    clean = {f"k{i}": (world.render(i).x * 255).round().to(torch.uint8)[:, : 40 + 8 * i] for i in range(2)}
    noisy = {
        k: (x.int() + torch.randint(-6, 7, x.shape, generator=draw)).clamp(0, 255).to(torch.uint8)
        for k, x in clean.items()
    }
    write(root / "clean", clean | {"spare": clean["k0"]})
    write(root / "advdm", AdvDM(AdvDM.Config(steps=2), model=tiny_model()).perturb(clean))
    write(root / "noise", noisy)
    return root


def array(path):
    with Image.open(path) as image:
        return np.array(image).astype(float)


def by_pillow(quality):
    def purify(path):
        data = io.BytesIO()
        Image.open(path).save(data, "JPEG", quality=quality, subsampling="4:2:0")
        return array(data)

    return purify


def by_pillows_median(path):
    with Image.open(path) as image:
        return np.array(image.filter(ImageFilter.MedianFilter(3))).astype(float)


def decibels(a, b):
    return 10 * np.log10(255**2 / ((a - b) ** 2).mean())


@pytest.mark.parametrize(
    ("text", "oracle"),
    [("jpeg:75", by_pillow(75)), ("jpeg:quality=25", by_pillow(25)), ("median", by_pillows_median)],
)
def test_numbers_are_those_of_pillow_and_numpy_on_the_files(made, tmp_path, text, oracle):
    report = survival(made / "clean", [made / "advdm"], purifiers=[text], bands=2, out=tmp_path / "deep" / "r.json")
    (row,) = report.poisons[0].purifiers
    shares = []
    for picture in row.pictures:
        files = [made / folder / f"{picture.key}.png" for folder in ("clean", "advdm")]
        a, b, c, d = array(files[0]), array(files[1]), oracle(files[1]), oracle(files[0])
        shares.append(((c - d) * (b - a)).sum() / ((b - a) ** 2).sum())
        assert picture.survival == pytest.approx(shares[-1], rel=1e-6)
        assert picture.max_levels == np.abs(b - a).max() <= 8
        assert picture.psnr_poisoned == pytest.approx(decibels(b, a))
        assert picture.psnr_purified == pytest.approx(decibels(c, a))
        assert picture.psnr_cost == pytest.approx(decibels(d, a))
        # Low half of the frequencies by NumPy's transform.
        f = np.hypot(np.fft.fftfreq(a.shape[0])[:, None], np.fft.fftfreq(a.shape[1]))[..., None]
        left, delta = (np.fft.fft2(v, axes=(0, 1)) * (f < 0.25) for v in (c - d, b - a))
        assert picture.bands[0].share == pytest.approx(
            (left * delta.conj()).real.sum() / (abs(delta) ** 2).sum(), rel=1e-6
        )
    assert [p.key for p in row.pictures] == ["k0", "k1"] and row.survival == pytest.approx(np.mean(shares))
    print(f"advdm after {text}: {row.survival:.3f} survives")
    assert Report.model_validate_json((tmp_path / "deep" / "r.json").read_text()) == report
    assert json.loads((tmp_path / "deep" / "r.json").read_text())["format"] == FORMAT


def test_several_poisons_meet_the_same_purifiers_in_one_table(made):
    report = survival(made / "clean", [made / "advdm", made / "noise"], purifiers=["jpeg:25", "bits:7"])
    alone = survival(made / "clean", [made / "noise"], purifiers=["jpeg:25", "bits:7"])
    assert report.poisons[1] == alone.poisons[0]
    blocks = describe(report).split("\n\n")
    assert [block.splitlines()[0].split(":")[0] for block in blocks[::2]][:2] == [
        str(made / n) for n in ("advdm", "noise")
    ]
    last = [[c.strip() for c in line.strip("|").split("|")] for line in blocks[-1].splitlines()]
    assert last[0] == ["survives", "advdm", "noise", "cost, dB"] and [r[0] for r in last[2:]] == ["jpeg:25", "bits:7"]
    jpeg, bits = report.poisons[1].purifiers
    assert last[2][2] == f"{jpeg.survival:.2f}" and last[3][2] == f"{bits.survival:.2f}"
    assert jpeg.survival < 0.5 < bits.survival


def test_models_purify_clean_and_poisoned_pictures_with_one_noise(made, tmp_path):
    folder = tiny_folder(tmp_path / "pipeline")
    texts = ["vae_roundtrip", "sdedit:0.02,steps=50"]
    report = survival(made / "clean", [made / "clean", made / "noise"], purifiers=texts, model=str(folder))
    same, noise = report.poisons
    for row in same.purifiers:  # nothing was poisoned, so nothing may differ
        assert all(p.psnr_cost == p.psnr_purified and p.survival is None for p in row.pictures)
    assert noise.purifiers[1].settings["pipeline"] == str(folder) and report.model == str(folder)
    assert noise.purifiers[1].settings["strength"] == 0.02


def test_a_text_is_a_name_a_value_or_settings():
    assert parse_purifier("median") == {"name": "median"}
    assert parse_purifier("jpeg:75") == {"name": "jpeg", "quality": 75}
    assert parse_purifier("sdedit:0.3,steps=50") == {"name": "sdedit", "strength": 0.3, "steps": 50}
    assert purifier_block("jpeg:50,subsampling=444") == {"name": "jpeg", "quality": 50, "subsampling": "444"}
    assert purifier_block("vae_roundtrip:/models/x")["pipeline"] == "/models/x"
    assert list(choose_purifiers([], None)) == list(STANDARD) and list(choose_purifiers([], "tiny")) == [
        *STANDARD,
        *WITH_MODEL,
    ]
    assert choose_purifiers([], "tiny")["sdedit:0.3"]["pipeline"] == "tiny"


@pytest.mark.parametrize(
    ("texts", "model", "said"),
    [
        (["jpg:75"], None, "Did you mean jpeg"),
        (["jpeg:"], None, "NAME:VALUE"),
        (["jpeg:75,50"], None, "NAME:VALUE"),
        (["jpeg:0"], None, "greater than or equal to 1"),
        (["jpeg:qualty=3"], None, "Did you mean quality"),
        (["szt"], None, "not a purifier"),
        (["sdedit"], None, "give --model"),
        (["sdedit:pipeline=tiny", "median"], "tiny", "none of"),
    ],
)
def test_wrong_purifiers_are_refused_with_a_word(texts, model, said):
    with pytest.raises(ConfigError, match=said):
        choose_purifiers(texts, model)


def test_folders_that_do_not_fit_are_refused(made, tmp_path):
    quick = {"purifiers": ["bits"]}
    x = torch.zeros(3, 9, 9, dtype=torch.uint8)
    with pytest.raises(DataError, match="has no picture other in .*clean"):
        survival(made / "clean", [write(tmp_path / "a", {"other": x})], **quick)
    with pytest.raises(DataError, match="is 9x9 pixels and"):
        survival(made / "clean", [write(tmp_path / "b", {"k0": x})], **quick)
    with pytest.raises(DataError, match="is no folder"):
        survival(made / "clean", [tmp_path / "nowhere"], **quick)
    with pytest.raises(DataError, match="no pictures"):
        survival(made / "clean", [write(tmp_path / "c", {})], **quick)
    with pytest.raises(ConfigError, match="once"):
        survival(made / "clean", [made / "noise"] * 2, **quick)
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "other.jpg")
    with pytest.raises(DataError, match="one stem"):
        survival(tmp_path / "a", [made / "noise"], **quick)


def test_the_command_prints_its_tables(made, tmp_path):
    given = [str(made / "clean"), str(made / "noise"), "--purifier", "jpeg:25", "--purifier", "bits:7", "--bands", "2"]
    result = CliRunner().invoke(app, ["survival", *given, "--out", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "2 pictures, changed by at most 6 levels" in lines[0] and (tmp_path / "r.json").is_file()
    assert [c.strip() for c in lines[2].strip("|").split("|")] == [
        "purifier", "cost, dB", "purified, dB", "survives", "0-0.25", "0.25-",
    ]  # fmt: skip
    assert lines[4].startswith("| jpeg:25")


def test_numbers_are_not_written_over_a_picture(made):
    """Row "`protect toy -o toy`", for `survival`."""
    file = next((made / "clean").glob("*.png"))
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="picture by its name"):
        survival(made / "clean", [made / "advdm"], purifiers=["bits:4"], out=file)
    assert file.read_bytes() == before
