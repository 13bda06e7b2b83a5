"""What a word's training says of the photos that it reads, refuses before it starts, and tells at its end."""

import errno
import json
import logging
import os

import pytest
from made import array, save
from tiny import tiny_folder

from poisonshield.api import train
from poisonshield.data.concepts.writer import write_concepts
from poisonshield.defenses.diffusion.sdedit import SDEdit
from poisonshield.errors import ConfigError, DataError, StorageError
from poisonshield.world.rendered import rendered_concepts

CONFIG = "configs/invert/rendered.yaml"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("pipeline") / "p", size=64)


@pytest.fixture
def settings(tmp_path, pipeline):
    """Of a run of two steps on two photos."""
    for name in ("00", "01"):
        save(tmp_path / "toy" / f"{name}.png", array(64, 64))
    return [
        f"model.pipeline={json.dumps(str(pipeline))}", f"run.dir={json.dumps(str(tmp_path / 'run'))}",
        f"data.train={json.dumps(str(tmp_path / 'toy'))}", "data.batch_size=2", "engine.max_steps=2",
        "data.concepts=null", "generate.count=1", "generate.steps=1", "engine.device=cpu",
    ]  # fmt: skip


def test_training_tells_what_it_reads_and_at_its_end_where_the_word_is(tmp_path, settings, caplog):
    """Rows "a word learned from 1 of 5 photos" and "the end of a word's training does not say where the word is"."""
    save(tmp_path / "toy" / "00-masklabel.png", array(64, 64))
    (tmp_path / "toy" / "film.mp4").write_bytes(b"x")
    with caplog.at_level(logging.INFO):
        folder = train(CONFIG, settings)
    assert "read 1 concepts, 2 pictures" in caplog.text and "toy/film.mp4" in caplog.text
    assert "1 mask files, which no setting asks for" in caplog.text
    file = folder / "export" / "toy" / "learned_embeds.safetensors"
    assert file.is_file() and f"<toy>, learned from toy: {file}" in caplog.text
    assert f"--embedding {file} -o pictures" in caplog.text


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.prompts=['a {} " + "photo " * 40 + "']"],
        ["generate.recon=['a {} " + "photo " * 40 + "']"],
        ["generate.compose=['a {}', '" + "photo " * 40 + " of a {}']"],
        ["method.vectors=30"],
    ],
)
def test_prompts_beyond_the_token_limit_are_refused_before_training(tmp_path, settings, overrides):
    """Row "a long `data.prompts` entry ends training at step 3"."""
    with pytest.raises(ConfigError, match="tokens too many"):
        train(CONFIG, [*settings, *overrides])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_captions_beyond_the_token_limit_are_refused_before_training(tmp_path, settings):
    """The same for captions, which are in files."""
    for name in ("00", "01"):
        (tmp_path / "toy" / f"{name}.txt").write_text("photo " * 20)
    with pytest.raises(ConfigError, match="tokens too many"):
        train(CONFIG, [*settings, "data.prompts=caption"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_photos_without_masks_have_one_way_out(settings):
    """Row "`szt` on photos without masks sends one from \"set masks: null\" to \"Set data.masks: file\" and back"."""
    szt = "defenses=[{name: szt, t_min: 500, mask: file}]"
    with pytest.raises(ConfigError, match="Set data.masks: file"):
        train(CONFIG, [*settings, szt])
    with pytest.raises(DataError, match="poisonshield masks PHOTOS -o MASKED") as caught:
        train(CONFIG, [*settings, szt, "data.masks=file"])
    assert "null" not in str(caught.value)


@pytest.mark.parametrize("strength, steps", [(0.3, 3), (0.1, 9), (0.7, 1), (1 / 3, 2), (0.29, 3), (0.0099, 101)])
def test_the_number_of_steps_that_is_told_is_one_that_works(strength, steps):
    """Row "3 steps ... Give 3 steps or more"."""
    with pytest.raises(ValueError, match="Give [0-9]+ steps or more") as caught:
        SDEdit.Config(strength=strength, steps=steps)
    told = int(str(caught.value).partition("Give ")[2].split()[0])
    assert told > steps and SDEdit.Config(strength=strength, steps=told)
    with pytest.raises(ValueError, match="less than one step"):
        SDEdit.Config(strength=strength, steps=told - 1)


def test_a_full_disk_is_told_when_concepts_are_written(tmp_path, monkeypatch):
    """Row "full or read-only disk ... poison", for concepts."""
    from pathlib import Path

    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StorageError, match="the disk is full"):
        write_concepts(rendered_concepts(1, seed=1, kinds=[("yellow", "ring")]), tmp_path / "set")
    assert not os.listdir(tmp_path)
