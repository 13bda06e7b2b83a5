"""`poisonshield generate` on a random pipeline's folder: pictures, sheet, record, and what is refused."""

import errno
import json
import os

import numpy
import pytest
import torch
from PIL import Image

from poisonshield import world
from poisonshield.api.generate import fill_prompts, generate
from poisonshield.errors import BusyError, ConfigError, DataError, StorageError
from poisonshield.files import LOCK
from poisonshield.models.diffusion.embeddings import Learned, save_embedding
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.models.diffusion.sampler import sample, start_noise
from poisonshield.world import small_pipeline as small

FAST = {"count": 2, "steps": 3, "guidance": 3.0}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    text = small.TextConfig(width=16, layers=1, heads=2)
    tokenizer = small.build_tokenizer(world.WORDS, folder / "tokenizer", length=text.length)
    unet = small.UNetConfig(channels=(16, 32), head=4)
    small.write_pipeline(
        folder,
        vae=small.build_vae(small.VAEConfig(channels=(8, 16), groups=4), sample_size=16),
        unet=small.build_unet(unet, sample_size=8, latent_channels=4, context=16),
        text_encoder=small.build_text_encoder(text, tokenizer),
        tokenizer=tokenizer,
        scheduler=small.build_scheduler(),
    )
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("one", 1), ("two", 2)):
        save_embedding(
            Learned(f"<{name}>", torch.randn(count, 16, generator=generator)), folder / f"{name}.safetensors"
        )
    return folder


def read(path):
    return torch.from_numpy(numpy.asarray(Image.open(path)).copy()).permute(2, 0, 1).float() / 255


def test_pictures_sheet_and_record_of_two_words_and_a_plain_prompt(pipeline, words, tmp_path):
    files = [words / "one.safetensors", f"<zwei>={words / 'two.safetensors'}"]
    prompts = ["a photo of a {}", "a photo of a red circle"]
    record = generate(pipeline, tmp_path / "out", embeddings=files, prompts=prompts, **FAST)
    assert record == json.loads((tmp_path / "out" / "generate.json").read_text())
    assert [p["spoken"] for p in record["prompts"]] == ["a photo of a <one>", "a photo of a <zwei>", prompts[1]]
    assert [w["token"] for w in record["words"]] == ["<one>", "<zwei>"]
    assert [w["vectors"] for w in record["words"]] == [1, 2]
    named = [tmp_path / "out" / f for p in record["prompts"] for f in p["files"]]
    assert len(named) == 6 and all(Image.open(f).size == (16, 16) for f in named)
    assert sorted(named) == sorted((tmp_path / "out").glob("*/*.png"))
    assert (tmp_path / "out" / "sheet.png").is_file()
    assert record["settings"]["size"] == 16 and len(record["pipeline_digest"]) == 64


def test_a_file_holds_what_the_sampler_gives_for_its_key(pipeline, words, tmp_path):
    record = generate(pipeline, tmp_path, embeddings=[words / "one.safetensors"], seed=5, **FAST)
    model = LatentDiffusion.load(pipeline)
    model.add_placeholder("<one>")
    rows = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    noise = start_noise(["a photo of a {}/1"], (4, 8, 8), seed=5)
    x = sample(model, model.prompts(["a photo of a <one>"], rows), noise=noise, steps=3, guidance=3.0)
    stored = read(tmp_path / record["prompts"][0]["files"][1])
    assert (stored - x[0]).abs().max() <= 0.5 / 255 + 1e-5


def test_a_picture_depends_on_seed_and_number_and_not_on_how_many_there_are(pipeline, tmp_path):
    few = generate(pipeline, tmp_path / "a", prompts=["a red ring"], **FAST)
    more = generate(pipeline, tmp_path / "b", prompts=["a star", "a red ring"], **(FAST | {"count": 3}))
    other = generate(pipeline, tmp_path / "c", prompts=["a red ring"], seed=1, **FAST)
    a, b = read(tmp_path / "a" / few["prompts"][0]["files"][1]), read(tmp_path / "b" / more["prompts"][1]["files"][1])
    assert (a - b).abs().max() <= 1 / 255
    assert (a - read(tmp_path / "c" / other["prompts"][0]["files"][1])).abs().max() > 5 / 255


def test_a_switch_at_the_top_lets_the_other_word_speak_alone(pipeline, words, tmp_path):
    file = [words / "one.safetensors"]
    switched = generate(pipeline, tmp_path / "a", embeddings=file, switch=1000, switch_word="ring", **FAST)
    assert switched["prompts"][0]["below_switch"] == "a photo of a ring"
    as_if = generate(pipeline, tmp_path / "b", embeddings=file, switch=0, switch_word="ring", **FAST)
    plain = generate(pipeline, tmp_path / "c", embeddings=file, **FAST)
    pictures = [
        read(tmp_path / n / r["prompts"][0]["files"][0]) for n, r in zip("abc", (switched, as_if, plain), strict=True)
    ]
    assert torch.equal(pictures[1], pictures[2]) and not torch.equal(pictures[0], pictures[2])


def test_longer_words_are_replaced_before_shorter_ones_within_them():
    rows = fill_prompts(["a {} beside <s>"], ["<s>", "<s>-b"], switch=5, switch_word="toy")
    assert [r.below_switch for r in rows] == ["a toy beside toy", "a toy beside toy"]
    (row,) = fill_prompts(["a ringlet"], ["ringlet", "ring"], switch=5, switch_word="earring")
    assert row.below_switch == "a earring"
    assert fill_prompts(["a star"], [], switch=5, switch_word="toy")[0].below_switch == "a star"


def test_other_sizes_and_half_precision_work(pipeline, tmp_path):
    record = generate(pipeline, tmp_path, prompts=["a star"], size=24, dtype="bf16", **FAST)
    assert Image.open(tmp_path / record["prompts"][0]["files"][0]).size == (24, 24)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": ["a {}"]}, ConfigError, "no embedding was given"),
        ({"prompts": []}, ConfigError, "no prompt"),
        ({"switch": 500}, ConfigError, "belong together"),
        ({"count": 0}, ConfigError, "at least 1"),
        ({"dtype": "int8"}, ConfigError, "fp32, bf16, fp16"),
        ({"steps": 0}, ConfigError, "0 steps"),
        ({"embeddings": ["nowhere.pt"]}, DataError, "nowhere.pt does not exist"),
        ({"prompts": ["a star", "photo " * 40 + "<one>"], "embeddings": ["one"]}, ConfigError, "tokens too many"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(pipeline, words, tmp_path, change, error, message):
    if change.get("embeddings") == ["one"]:
        change = change | {"embeddings": [words / "one.safetensors"]}
    with pytest.raises(error, match=message):
        generate(pipeline, tmp_path / "out", **({"prompts": ["a star"]} | FAST | change))
    assert not (tmp_path / "out").exists()


def test_a_long_prompt_is_named_with_how_much_is_too_long(pipeline, tmp_path):
    """Row "prompt beyond the token limit": also without a learned word, and in the switch's prompt."""
    with pytest.raises(ConfigError, match="the prompt 'photo photo .* is 18 tokens too many: it has 42 .* reads 24"):
        generate(pipeline, tmp_path / "out", prompts=["a star", " ".join(["photo"] * 40)], **FAST)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"switch": 5000, "switch_word": "ring"}, {"guidance": float("nan")}])
def test_settings_of_drawing_are_refused_before_anything_is_written(pipeline, words, tmp_path, change):
    with pytest.raises(ConfigError, match="switch at timestep|no number"):
        generate(pipeline, tmp_path / "out", embeddings=[words / "one.safetensors"], **(FAST | change))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_in_words_and_leaves_no_draft(pipeline, tmp_path, monkeypatch):
    """Row "full or read-only disk", for `generate`."""
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StorageError, match="cannot be written: the disk is full"):
        generate(pipeline, tmp_path / "out", prompts=["a star"], **FAST)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_file_in_the_place_of_the_folder_is_refused(pipeline, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ConfigError, match="out is a file, and a folder is wanted"):
        generate(pipeline, tmp_path / "out", prompts=["a star"], **FAST)


def test_two_commands_do_not_write_into_one_folder(pipeline, tmp_path):
    """Row "two runs in one folder", for `generate`."""
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "5", "boot": "b"}))
    with pytest.raises(BusyError, match="process 1 on elsewhere writes this set of pictures"):
        generate(pipeline, tmp_path, prompts=["a star"], **FAST)


@pytest.mark.parametrize("record", ["{", '{"prompts": 3}', "[" * 100_000])
def test_a_record_that_is_none_is_refused_in_words(pipeline, tmp_path, record):
    (tmp_path / "generate.json").write_text(record)
    with pytest.raises(DataError, match="generate.json is no record of pictures"):
        generate(pipeline, tmp_path, prompts=["a star"], overwrite=True, **FAST)


def test_pictures_are_not_written_over_unless_asked(pipeline, tmp_path):
    generate(pipeline, tmp_path, prompts=["a star"], **FAST)
    with pytest.raises(ConfigError, match="--overwrite"):
        generate(pipeline, tmp_path, prompts=["a ring"], **FAST)
    record = generate(pipeline, tmp_path, prompts=["a ring"], overwrite=True, **FAST)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("*/*.png")} == set(record["prompts"][0]["files"])
