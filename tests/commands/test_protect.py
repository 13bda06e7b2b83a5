"""`protect` on real files: same size, same stem, lossless, budget on the file, manifest, and what it refuses."""

import errno
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from poisonshield import world
from poisonshield.api import protect as command
from poisonshield.api.protect import STATE, TINY_NOTE, manifest_of, protect
from poisonshield.cli import app
from poisonshield.errors import BudgetError, BusyError, ConfigError, DataError, StorageError
from poisonshield.files import LOCK
from poisonshield.world import small_pipeline as small


def write(path, size=(40, 28), *, mode="RGB", seed=0, **how):
    """A smooth coloured picture of (width, height)."""
    x = world.render(seed).x
    x = torch.nn.functional.interpolate(x[None], (size[1], size[0]), mode="bilinear", antialias=True)[0]
    image = Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)
    return path


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def change(source, result):
    return np.abs(pixels(source).astype(int) - pixels(result).astype(int))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder as diffusers writes it, random weights: 4 pixels a latent cell, sides multiples of 8."""
    folder = tmp_path_factory.mktemp("pipeline")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = small.TextConfig(width=16, layers=1, heads=2)
        tokenizer = small.build_tokenizer(world.WORDS, folder / "tokenizer", length=text.length)
        small.write_pipeline(
            folder,
            vae=small.build_vae(small.VAEConfig(channels=(4, 8, 8), groups=4), sample_size=32),
            unet=small.build_unet(
                small.UNetConfig(channels=(8, 16), head=4, groups=4), sample_size=8, latent_channels=4, context=16
            ),
            text_encoder=small.build_text_encoder(text, tokenizer),
            tokenizer=tokenizer,
            scheduler=small.build_scheduler(),
        )
    return folder


def test_a_large_photo_keeps_its_size_and_its_budget(pipeline, tmp_path, capsys):
    source = write(tmp_path / "in" / "holiday.jpg", (1200, 800), quality=95)
    before = source.read_bytes()
    how = {"method": "sds-", "eps_levels": 4, "steps": 2, "tile": 192, "settings": ["overlap=16"]}
    (png,) = protect([source], tmp_path / "out", model=pipeline, **how, say=print)
    moved, record = change(source, png), json.loads(manifest_of(png).read_text())
    assert png == tmp_path / "out" / "holiday.png" and Image.open(png).format == "PNG"
    # Two steps of one level: half of the values are back where they were.
    assert moved.shape == (800, 1200, 3) and 0 < moved.max() <= 4 and moved.any(2).mean() > 0.8
    assert source.read_bytes() == before
    assert (record["method"], record["config"]["direction"], record["steps"], record["seed"]) == ("sds", "-", 2, 0)
    assert record["measured"]["max"] == moved.max()
    assert record["measured"]["mean_abs"] == pytest.approx(moved.mean())
    assert record["measured"]["l2"] == pytest.approx(np.sqrt((moved**2).sum()))
    assert record["measured"]["psnr_db"] == pytest.approx(10 * np.log10(255**2 / (moved**2).mean()))
    assert record["source"] == {"file": "holiday.jpg", "sha256": hashlib.sha256(before).hexdigest()}
    assert record["png_sha256"] == hashlib.sha256(png.read_bytes()).hexdigest()
    assert len(record["model"]["sha256"]) == 64 and record["prompt"] == "a photo"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["holiday.png", "holiday.poison.json"]
    said = capsys.readouterr().out
    assert "holiday.png" in said and "PSNR" in said and TINY_NOTE not in said


def test_photos_are_turned_as_exif_says(pipeline, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees to the right
    source = write(tmp_path / "a.jpg", (48, 24), exif=exif, quality=100)
    (png,) = protect([source], tmp_path / "a_safe.png", method="vae", steps=1, model=pipeline)
    turned = np.rot90(pixels(source), -1).astype(int)
    assert pixels(png).shape == (48, 24, 3) and np.abs(pixels(png) - turned).max() <= 8
    assert Image.open(png).getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("name", "mode"), [("a.png", "RGB"), ("a.webp", "RGB"), ("a.png", "L"), ("a.png", "P"), ("a.JPG", "RGB")]
)
def test_formats_and_modes_become_rgb_png(pipeline, tmp_path, name, mode):
    source = write(tmp_path / "in" / name, mode=mode)
    (png,) = protect([source], tmp_path / "out", method="vae", steps=1, model=pipeline)
    with Image.open(source) as image:
        wanted = np.array(image.convert("RGB")).astype(int)
    assert png.name == "a.png" and 0 < np.abs(pixels(png) - wanted).max() <= 8


def test_alpha_and_colour_profile_are_kept(pipeline, tmp_path):
    source = tmp_path / "in" / "a.png"
    source.parent.mkdir()
    values = np.random.default_rng(0).integers(0, 256, (28, 40, 4), dtype=np.uint8)
    Image.fromarray(values, "RGBA").save(source, icc_profile=b"not parsed")
    (png,) = protect([source], tmp_path / "out", method="vae", steps=1, model=pipeline)
    with Image.open(png) as image:
        assert image.mode == "RGBA" and image.info["icc_profile"] == b"not parsed"
        found = np.array(image)
    assert np.array_equal(found[..., 3], values[..., 3])
    assert 0 < np.abs(found[..., :3].astype(int) - values[..., :3]).max() <= 8


def test_lossy_and_other_outputs_are_refused_with_the_reason(pipeline, tmp_path):
    source = write(tmp_path / "a.jpg")
    with pytest.raises(ConfigError, match="lossy compression is a defense"):
        protect([source], tmp_path / "b.jpg", model=pipeline)
    with pytest.raises(ConfigError, match="PNG is what is written"):
        protect([source], tmp_path / "b.webp", model=pipeline)
    with pytest.raises(ConfigError, match="Give a folder"):
        protect([source, write(tmp_path / "c.jpg")], tmp_path / "b.png", model=pipeline)
    with pytest.raises(ConfigError, match="would both become"):
        protect([source, write(tmp_path / "a.png")], tmp_path / "out", model=pipeline)
    with pytest.raises(ConfigError, match="is the picture itself"):
        protect([tmp_path / "a.png"], tmp_path, model=pipeline)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_protected_is_refused_in_words(pipeline, tmp_path):
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((9, 9), dtype=np.uint16)).save(deep)
    frames = [Image.new("RGB", (9, 9), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("CMYK", (9, 9)).save(tmp_path / "ink.jpg")
    for name, words in (
        ("deep.png", "more than 8 bits"),
        ("moving.webp", "animation of 2"),
        ("broken.png", "not a whole"),
        ("ink.jpg", "CMYK"),
        ("absent.png", "does not exist"),
    ):
        with pytest.raises(DataError, match=words):
            protect([tmp_path / name], tmp_path / "out", model=pipeline)
    with pytest.raises(DataError, match="Convert it first"):
        protect([write(tmp_path / "a.ico")], tmp_path / "out", model=pipeline)


def test_settings_and_budgets_are_checked(pipeline, tmp_path):
    source = write(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="Did you mean step_levels"):
        protect([source], tmp_path / "out", settings=["step_level=2"], model=pipeline)
    with pytest.raises(ConfigError, match="not a diffusion poison"):
        protect([source], tmp_path / "out", method="mists", model=pipeline)
    with pytest.raises(BudgetError, match="beyond 255"):
        protect([source], tmp_path / "out", eps_levels=300, model=pipeline)
    with pytest.raises(ConfigError, match="trains no surrogate"):
        protect([source], tmp_path / "out", reference=[source], model=pipeline)
    (png,) = protect(
        [source],
        tmp_path / "out",
        preset="mist",
        eps_levels=4,
        steps=1,
        settings=["mode=tex", "t_range=[500, 1000]"],
        model=pipeline,
    )
    record = json.loads(manifest_of(png).read_text())
    assert (record["preset"], record["method"], record["budget"]["eps_levels"]) == ("mist", "mist", 4)
    assert record["config"]["t_range"] == [500, 1000] and record["config"]["mode"] == "tex"


def test_a_mask_keeps_the_change_inside(pipeline, tmp_path):
    source = write(tmp_path / "in" / "a.jpg")
    mask = np.zeros((28, 40), dtype=np.uint8)
    mask[5:20, 8:30] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    (png,) = protect([source], tmp_path / "out", method="vae", steps=1, mask=tmp_path / "masks", model=pipeline)
    moved = change(source, png).max(2)
    assert moved[mask == 0].max() == 0 and moved[mask > 0].max() > 0
    with pytest.raises(DataError, match="b.jpg has no mask"):
        protect([write(tmp_path / "in" / "b.jpg")], tmp_path / "o", mask=tmp_path / "masks", model=pipeline)
    with pytest.raises(DataError, match="must be equal"):
        protect([write(tmp_path / "in" / "a.png", (20, 20))], tmp_path / "o", mask=tmp_path / "masks", model=pipeline)


def test_a_stopped_command_goes_on_and_a_finished_one_is_left_alone(pipeline, tmp_path, monkeypatch, capsys):
    sources = [write(tmp_path / "in" / f"{n}.png", seed=i) for i, n in enumerate("abc")]
    how = {"method": "advdm", "steps": 30, "model": pipeline}
    whole = protect([tmp_path / "in"], tmp_path / "whole", **how)
    out, steps = tmp_path / "out", []
    from poisonshield.poisons.diffusion.attack.canvas import Canvas

    real = Canvas.advance

    def dies(self, total):
        steps.append(self.keys)
        if len(steps) == 30 + 27:
            raise KeyboardInterrupt
        real(self, total)

    monkeypatch.setattr(Canvas, "advance", dies)
    with pytest.raises(KeyboardInterrupt):
        protect(sources, out, **how)
    assert sorted(p.name for p in out.iterdir()) == [STATE, "a.png", "a.poison.json"]
    assert len([*(out / STATE).iterdir()]) == 1
    protect(sources, out, **how)
    # b was at step 26, and its state at step 25; c had not begun.
    assert len(steps) == 30 + 27 + 5 + 30
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{n}{e}" for n in "abc" for e in (".png", ".poison.json"))
    assert [p.read_bytes() for p in whole] == [(out / p.name).read_bytes() for p in whole]
    protect(sources, out, **how, say=print)
    assert len(steps) == 92 and capsys.readouterr().out.count("is there already") == 3
    with pytest.raises(ConfigError, match="made otherwise"):
        protect(sources, out, **{**how, "steps": 1})
    protect(sources, out, overwrite=True, **{**how, "steps": 1})
    assert json.loads((out / "a.poison.json").read_text())["steps"] == 1


def test_what_stops_the_last_photo_stops_the_command_before_the_first(pipeline, tmp_path):
    """A stale output and a missing mask come to light before hours are spent."""
    sources = [write(tmp_path / "in" / f"{n}.png", seed=i) for i, n in enumerate("ab")]
    how, out = {"method": "vae", "model": pipeline}, tmp_path / "out"
    protect(sources[1:], out, steps=1, **how)
    with pytest.raises(ConfigError, match="b.png exists and was made otherwise"):
        protect(sources, out, steps=2, **how)
    masks = tmp_path / "masks"
    write(masks / "a.png", mode="L")
    with pytest.raises(DataError, match="b.png has no mask"):
        protect(sources, tmp_path / "masked", steps=1, mask=masks, **how)
    assert not [*tmp_path.glob("*/a.poison.json")]


def test_two_reference_pictures_of_one_name_are_refused(pipeline, tmp_path):
    source = write(tmp_path / "a.png")
    twice = [write(tmp_path / folder / "r.png", (16, 16)) for folder in ("x", "y")]
    with pytest.raises(ConfigError, match="reference: .*both called r"):
        protect([source], tmp_path / "out", method="fsmg", reference=twice, model=pipeline)


def test_nothing_half_written_is_left(pipeline, tmp_path, monkeypatch):
    source = write(tmp_path / "a.png")
    monkeypatch.setattr(command, "write_whole", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        protect([source], tmp_path / "out", method="vae", steps=1, model=pipeline)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [STATE]


def test_of_several_photos_those_that_can_be_read_are_done_and_the_others_named(pipeline, tmp_path):
    """Row "2 of 6 photos protected, rc 0": every file is done or named, and the status says it."""
    folder = tmp_path / "in"
    good = [write(folder / f"{n}.png", seed=i) for i, n in enumerate("ab")]
    (folder / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "d.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(12))
    (folder / "film.mp4").write_bytes(b"x")
    write(folder / "a-masklabel.png", mode="L")
    asked = ["protect", str(folder), "-o", str(tmp_path / "out"), "--method", "vae", "--steps", "1"]
    result = CliRunner().invoke(app, [*asked, "--model", str(pipeline)])
    assert result.exit_code == 1 and isinstance(result.exception, DataError)
    told = str(result.exception)
    assert told.startswith("2 of 4 files were not protected") and "c.png: 8 bytes" in told and "d.heic" in told
    assert "left out: 1 files that are no pictures by their ending: film.mp4" in result.output
    assert "1 masks of photos by their names: a-masklabel.png" in result.output
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["a.png", "a.poison.json", "b.png", "b.poison.json"]
    with pytest.raises(DataError, match="(?s)1 of 2 files were not protected.*no picture by its name"):
        protect([good[0], folder / "film.mp4"], tmp_path / "again", method="vae", steps=1, model=pipeline)
    assert (tmp_path / "again" / "a.png").is_file()


def test_a_poison_of_all_photos_together_begins_with_all_or_none(pipeline, tmp_path):
    sources = [write(tmp_path / "in" / "a.png", (16, 16)), tmp_path / "in" / "b.png"]
    sources[1].write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match="1 of 2 files were not protected"):
        protect(sources, tmp_path / "out", method="aspl", steps=1, model=pipeline)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["toy", "link", "toy/out"])
def test_the_folder_of_the_originals_is_refused(pipeline, tmp_path, place):
    """Row "`protect toy -o toy`": also through a link, and below it."""
    source = write(tmp_path / "toy" / "a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "toy")
    with pytest.raises(ConfigError, match="the folder of the originals"):
        protect([tmp_path / "toy"], tmp_path / place, method="vae", steps=1, model=pipeline)
    if place != "toy/out":
        with pytest.raises(ConfigError, match="the folder of the originals"):
            protect([source], tmp_path / place, method="vae", steps=1, model=pipeline)
    assert [p.name for p in (tmp_path / "toy").iterdir()] == ["a.jpg"]


def test_a_photo_that_is_given_twice_is_named(pipeline, tmp_path):
    """Row "`protect X X` would both become"."""
    source = write(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "b.jpg").symlink_to(source)
    with pytest.raises(ConfigError, match="a.jpg was given twice. Give each photo once"):
        protect([source, source], tmp_path / "out", model=pipeline)
    with pytest.raises(ConfigError, match="a.jpg was given twice"):
        protect([source, source.parent], tmp_path / "out", model=pipeline)
    with pytest.raises(ConfigError, match="a.jpg and .*b.jpg are one file"):
        protect([source.parent], tmp_path / "out", model=pipeline)


@pytest.mark.parametrize(
    "how", [{"prompt": "photo " * 40}, {"method": "aspl", "settings": ["class_prompt=" + "photo " * 40]}]
)
def test_prompts_beyond_the_token_limit_are_refused_before_anything_starts(pipeline, tmp_path, how):
    """Row "prompt beyond the token limit, in generate and protect"."""
    with pytest.raises(ConfigError, match="the prompt .*18 tokens too many: it has 42"):
        protect([write(tmp_path / "in" / "a.png")], tmp_path / "out", model=pipeline, **how)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_in_words_and_leaves_no_draft(pipeline, tmp_path, monkeypatch):
    """Row "full or read-only disk in import, poison, protect, generate"."""
    source = write(tmp_path / "in" / "a.png")
    full = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(command, "flush", full)
    with pytest.raises(StorageError, match="cannot be written: the disk is full"):
        protect([source], tmp_path / "out", method="vae", steps=1, model=pipeline)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [STATE]


def test_a_file_in_the_place_of_a_folder_and_a_manifest_that_is_none_are_worded(pipeline, tmp_path):
    source = write(tmp_path / "in" / "a.png")
    (tmp_path / "notes.txt").write_text("x")
    for out in ("notes.txt", "notes.txt/deeper"):
        with pytest.raises(ConfigError, match="notes.txt is a file, and a folder is wanted"):
            protect([source], tmp_path / out, method="vae", steps=1, model=pipeline)
    write(tmp_path / "out" / "a.png")
    for content in ("[" * 100_000, "[1]", "{"):
        (tmp_path / "out" / "a.poison.json").write_text(content)
        with pytest.raises(ConfigError, match="made otherwise"):
            protect([source], tmp_path / "out", method="vae", steps=1, model=pipeline)


def test_two_commands_do_not_write_into_one_folder(pipeline, tmp_path):
    """Row "two runs in one folder", for `protect`."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "5", "boot": "b"}))
    with pytest.raises(BusyError, match="process 1 on elsewhere writes this set of protected photos"):
        protect([write(tmp_path / "in" / "a.png")], tmp_path / "out", method="vae", steps=1, model=pipeline)


def test_a_file_over_budget_is_not_kept(pipeline, tmp_path, monkeypatch):
    source = write(tmp_path / "a.png")
    real = command._to_image
    monkeypatch.setattr(
        command, "_to_image", lambda x, alpha: real((x.int() - 40).clamp(0, 255).to(torch.uint8), alpha)
    )
    with pytest.raises(BudgetError, match="8 were allowed"):
        protect([source], tmp_path / "out", method="vae", steps=1, model=pipeline)
    assert not [*(tmp_path / "out").glob("*.png")]


def test_methods_with_a_surrogate_take_reference_pictures(pipeline, tmp_path):
    sources = [write(tmp_path / "in" / f"{n}.png", (16, 16), seed=i) for i, n in enumerate("ab")]
    learned = [write(tmp_path / "ref" / f"{n}.png", (16, 16), seed=9) for n in "r"]
    how = {"method": "fsmg", "steps": 1, "settings": ["surrogate_steps=2", "lr=0.01"], "model": pipeline}
    alone = protect(sources, tmp_path / "alone", **how)
    given = protect(sources, tmp_path / "given", reference=learned, **how)
    assert [p.name for p in alone] == ["a.png", "b.png"]
    assert all(change(s, p).max() > 0 for s, p in zip(sources, given, strict=True))
    record = json.loads(manifest_of(given[0]).read_text())
    assert record["prompt"] == "a photo of sks person"


def test_the_objective_is_measured_when_asked(pipeline, tmp_path):
    source = write(tmp_path / "a.png")
    (png,) = protect([source], tmp_path / "out", method="vae", steps=2, measure=True, model=pipeline)
    found = json.loads(manifest_of(png).read_text())["objective"]
    assert found["draws"] == 32 and found["after"] > found["before"] == 0


def test_the_shipped_pipeline_says_that_it_protects_nothing(pipeline, tmp_path, monkeypatch):
    from poisonshield.models.diffusion import pipeline as latent_diffusion

    monkeypatch.setattr(latent_diffusion, "TINY", pipeline)
    photo = str(write(tmp_path / "a.png"))
    result = CliRunner().invoke(app, ["protect", photo, "-o", str(tmp_path / "out"), "--method", "vae", "--steps", "1"])
    assert result.exit_code == 0 and "protects against nothing real" in result.output and "PSNR" in result.output
